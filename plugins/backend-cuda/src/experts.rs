//! The launches of a mixture of experts: rows are listed by expert, multiplied, and their experts' results summed.

use setu_core::Result;

use crate::gpu::{Arguments, Kernel, Shape};
use crate::ops::{Operand, Pass, by_row, operand};
use crate::product::{ExpertRows, Product};

/// The experts' constants, and their scratch memory.
#[derive(Clone, Debug)]
pub struct Experts {
    pub lists: Kernel,
    pub sum: Kernel,
    /// Gate and up with the activation between them.
    pub up: Product,
    /// Where they have different formats `up` is the gate alone, this is up, and the kernel puts both together.
    pub apart: Option<(Product, Kernel)>,
    pub down: Product,
    pub lists_of: ExpertRows,
    /// Of each row and expert, which pair it is.
    pub pairs: u64,
    pub routing: Operand,
    pub out: Operand,
}

impl Experts {
    pub fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let ExpertRows { offsets, rows, experts, .. } = self.lists_of;
        let lists = operand(Arguments::new(), self.routing).int(pass.rows).int(experts);
        let lists = lists.address(offsets).address(rows).address(self.pairs);
        pass.launch(&self.lists, Shape::new((1, 1, 1), 32 * experts.min(32)), lists)?;
        self.up.launch(pass)?;
        if let Some((up, binary)) = &self.apart {
            up.launch(pass)?;
            let (gated, upped) = (self.up.out.floats, up.out.floats);
            // Pairs that there could be; what lies in those that there aren't is read by nobody.
            let most = pass.rows * self.lists_of.top_k;
            let product = operand(operand(Arguments::new().int(self.up.activation), gated), upped);
            pass.launch(binary, by_row(most, gated.cols), operand(product, gated).int(gated.cols))?;
        }
        self.down.launch(pass)?;
        let sum = operand(Arguments::new(), self.routing).address(self.pairs).int(experts);
        let sum = operand(operand(sum, self.down.out.floats), self.out).int(self.out.cols);
        pass.launch(&self.sum, by_row(pass.rows, self.out.cols), sum)
    }
}
