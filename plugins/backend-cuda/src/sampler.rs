//! Sampler slots: what the host knows of them, and how they get to the device.

use setu_core::backend::SlotOpen;
use setu_core::rows::Rows;
use setu_core::{Error, Result};

use crate::gpu::{Device, Memory, Stream};

/// Bytes of the structs `Slot` and `OpenedSlot` of `kernels/slot.cuh`.
pub const SLOT_BYTES: usize = 72;
pub const OPENED_BYTES: usize = SLOT_BYTES + 16;

/// A slot to open.
#[derive(Clone, Debug, PartialEq)]
pub struct Opened {
    pub number: u32,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    top_k: u32,
    seed: u64,
    min_tokens: u32,
    generated: u32,
    has_penalties: bool,
    suppressed: u32,
    biased: u32,
    /// Pairs of a token and how it was seen: twice the times in the output, plus one if it is in the prompt.
    pub history: Vec<u32>,
    /// Suppressed tokens, then tokens with a bias, then their biases.
    pub lists: Vec<u32>,
}

impl Opened {
    fn new(open: &SlotOpen<'_>, vocab: usize) -> Opened {
        let state = open.state();
        let mut seen: Vec<(u32, u32)> = state
            .seen
            .iter()
            .filter(|(token, _)| (**token as usize) < vocab)
            .map(|(&token, seen)| (token, seen.in_output << 1 | u32::from(seen.in_prompt)))
            .collect();
        seen.sort_unstable();
        let (tokens, values): (Vec<u32>, Vec<f32>) = state.logit_bias.iter().copied().unzip();
        let values = values.iter().map(|value| value.to_bits());
        Opened {
            number: open.slot,
            temperature: state.temperature,
            top_p: state.top_p,
            min_p: state.min_p,
            typical_p: state.typical_p,
            repetition_penalty: state.repetition_penalty,
            presence_penalty: state.presence_penalty,
            frequency_penalty: state.frequency_penalty,
            top_k: state.top_k,
            seed: state.seed,
            min_tokens: state.min_tokens,
            generated: state.generated,
            has_penalties: state.has_penalties(),
            suppressed: state.suppressed.len() as u32,
            biased: tokens.len() as u32,
            history: seen.into_iter().flat_map(|(token, seen)| [token, seen]).collect(),
            lists: state.suppressed.iter().copied().chain(tokens.iter().copied()).chain(values).collect(),
        }
    }

    /// The struct `OpenedSlot`, its lists at `lists`, its history from pair `first_pair` on.
    fn to_bytes(&self, lists: u64, first_pair: u32) -> [u8; OPENED_BYTES] {
        let floats = [
            self.temperature,
            self.top_p,
            self.min_p,
            self.typical_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        ];
        let has_penalties = u32::from(self.has_penalties);
        let counts =
            [self.top_k, self.min_tokens, self.generated, has_penalties, self.suppressed, self.biased, 0, self.number];
        let history = [first_pair, self.history.len() as u32 / 2, 0];
        let words = floats.iter().map(|float| float.to_bits()).chain(counts).chain(history);
        let bytes = [self.seed, lists].into_iter().flat_map(u64::to_le_bytes);
        let mut all = [0; OPENED_BYTES];
        all.iter_mut().zip(bytes.chain(words.flat_map(u32::to_le_bytes))).for_each(|(to, byte)| *to = byte);
        all
    }
}

/// The slots that a step opens. Of several openings of a slot the last counts.
pub fn read_opened(slots: Rows<'_, SlotOpen<'_>>, vocab: usize) -> Vec<Opened> {
    let mut opened: Vec<Opened> = Vec::with_capacity(slots.len());
    for slot in slots.iter() {
        opened.retain(|open| open.number != slot.slot);
        opened.push(Opened::new(slot, vocab));
    }
    opened
}

/// The slots on the device.
#[derive(Debug)]
pub struct Slots {
    device: Device,
    /// The structs `Slot`.
    slots: Memory,
    /// What each has seen, a word for each token of the vocabulary.
    seen: Memory,
    /// The lists of each, where it has any.
    lists: Vec<Option<Memory>>,
}

impl Slots {
    pub fn new(device: &Device, slots: usize, vocab: usize) -> Result<Slots> {
        let bytes = slots.checked_mul(vocab).and_then(|words| words.checked_mul(4));
        let bytes = bytes.ok_or_else(|| Error::exhausted(format!("{slots} slots of {vocab} tokens overflow")))?;
        Ok(Slots {
            device: device.clone(),
            slots: device.allocate(slots * SLOT_BYTES, "sampler slots")?,
            seen: device.allocate(bytes, &format!("the histories of {slots} sampler slots"))?,
            lists: std::iter::repeat_with(|| None).take(slots).collect(),
        })
    }

    pub fn byte_len(&self) -> usize {
        self.slots.len() + self.seen.len()
    }

    pub fn address(&self) -> u64 {
        self.slots.address()
    }

    pub fn seen_address(&self) -> u64 {
        self.seen.address()
    }

    /// Makes room for the lists of `opened` and writes their structs to `to`.
    ///
    /// # Errors
    /// There is no memory for them; then nothing has changed.
    pub fn prepare(&mut self, opened: &[Opened], to: &mut [u8]) -> Result<()> {
        let mut grown = Vec::new();
        for open in opened {
            let held = self.lists[open.number as usize].as_ref().map_or(0, Memory::len);
            if held < 4 * open.lists.len() {
                let bytes = (4 * open.lists.len()).next_power_of_two();
                grown.push((open.number, self.device.allocate(bytes, "a sampler slot's lists")?));
            }
        }
        for (number, memory) in grown {
            self.lists[number as usize] = Some(memory);
        }
        let mut first_pair = 0;
        for (open, to) in opened.iter().zip(to.chunks_exact_mut(OPENED_BYTES)) {
            to.copy_from_slice(&open.to_bytes(self.lists_of(open), first_pair));
            first_pair += open.history.len() as u32 / 2;
        }
        Ok(())
    }

    /// Queues copies of the lists, which lie one behind the other from `from` on, to where the slots keep them.
    pub fn copy_lists(&self, stream: &Stream, opened: &[Opened], mut from: u64) -> Result<()> {
        for open in opened {
            let bytes = 4 * open.lists.len();
            // SAFETY: `prepare` made room for the lists, and the upload holds them all.
            unsafe { stream.copy(self.lists_of(open), from, bytes)? };
            from += bytes as u64;
        }
        Ok(())
    }

    fn lists_of(&self, open: &Opened) -> u64 {
        self.lists[open.number as usize].as_ref().map_or(0, Memory::address)
    }
}
