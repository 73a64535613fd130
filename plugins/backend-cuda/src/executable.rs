//! Steps from submission to their outputs.
//!
//! Two steps may be in flight. Each has a lane: pinned memory that it goes up from, device memory that it and its
//! results lie in, pinned memory that they come down to. A step is launched when it is submitted and nobody waits: one
//! in which every session decodes, as a graph that was captured for its size of batch, which saves most of its launches;
//! its stage of wants waits for masks where they were announced, and then everything behind it waits too. Sampled
//! tokens stay in the lane, where the step behind finds those that it carries on.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::Instant;

use setu_core::backend::{Executable, ExecutableInfo, Masks, NO_TOKEN, Step, StepLimits, StepOutputs, Want};
use setu_core::{Error, ErrorKind, Result, Ticket};

use crate::gpu::{Arguments, Device, Event, Kernel, LaunchGraph, Memory, Module, Shape, Stream};
use crate::kv::Pages;
use crate::ops::Pass;
use crate::pinned::Pinned;
use crate::plan::Plan;
use crate::sampler::Slots;
use crate::step::{Bucket, Limits, StepData, WANT_BYTES};

/// Steps that may be open at once: one for each lane.
const LANES: usize = 2;
/// Most pages that a step's tables have room for from the start.
const MOST_PAGES: usize = 1 << 20;

/// The kernels that belong to no node.
#[derive(Debug)]
pub struct StepKernels {
    pub open: Kernel,
    pub carry: Kernel,
    pub answer: Kernel,
}

/// A graph on the device.
#[derive(Debug)]
pub struct Parts {
    pub device: Device,
    pub plan: Plan,
    pub pages: Pages,
    pub slots: Slots,
    /// Processed logits of a pass.
    pub scratch: Memory,
    pub kernels: StepKernels,
    pub limits: Limits,
    pub weights: Vec<Memory>,
    /// Kept for the kernels.
    pub _modules: Vec<Module>,
}

/// A compiled graph.
#[derive(Debug)]
pub struct CudaExecutable {
    /// Captured launches of buckets, by lane. They are dropped before what they use.
    graphs: HashMap<(usize, Bucket), LaunchGraph>,
    parts: Parts,
    lanes: [Lane; LANES],
    stream: Stream,
    /// Steps that were submitted and not waited for, oldest first.
    open: VecDeque<Pending>,
    submitted: u64,
    /// Slots that have been opened by the steps submitted so far.
    open_slots: Vec<bool>,
    /// For each want of the step submitted last, whether it samples.
    last_wants: Vec<bool>,
    /// Why nothing can run any more.
    broken: Option<Error>,
}

/// A step's memory.
#[derive(Debug)]
struct Lane {
    up: Pinned,
    upload: Memory,
    masks: Memory,
    results: Memory,
    down: Pinned,
    start: Event,
    end: Event,
}

#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    lane: usize,
    step: StepData,
    results: Results,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    TokensLaunched,
    Launched,
}

/// Where a step's results lie, in bytes from the lane's results and from what comes down. Tokens come first.
#[derive(Clone, Copy, Debug)]
struct Results {
    logprobs: usize,
    top_tokens: usize,
    top_logprobs: usize,
    top_stride: usize,
    /// Where the device's part ends; rows of logits come down behind it.
    logits: usize,
    end: usize,
}

impl Results {
    fn of(step: &StepData, vocab: usize) -> Results {
        let wants = step.want_rows();
        let top_stride = step.wants.iter().map(|want| want.top as usize).max().unwrap_or(0);
        let rows = step.wants.iter().filter(|want| want.has(Want::LOGITS)).count();
        let (column, top) = (4 * wants, 4 * wants * top_stride);
        let logits = 2 * column + 2 * top;
        Results {
            logprobs: column,
            top_tokens: 2 * column,
            top_logprobs: 2 * column + top,
            top_stride,
            logits,
            end: logits + 4 * rows * vocab,
        }
    }
}

impl Lane {
    fn new(device: &Device) -> Result<Lane> {
        Ok(Lane {
            up: Pinned::zeroed(device, 0)?,
            upload: device.allocate(0, "a step's tables")?,
            masks: device.allocate(0, "masks")?,
            results: device.allocate(0, "a step's results")?,
            down: Pinned::zeroed(device, 0)?,
            start: device.event()?,
            end: device.event()?,
        })
    }

    /// Makes room for a step. The step that had the lane before was waited for. Whether memory on the device moved.
    fn fit(&mut self, device: &Device, step: &StepData, results: Results) -> Result<bool> {
        let masks = step.wants.iter().filter(|want| want.has(Want::MASKED)).count();
        self.fit_bytes(device, step.upload.len(), masks * step.mask_words * 4, results)
    }

    fn fit_bytes(&mut self, device: &Device, upload: usize, masks: usize, results: Results) -> Result<bool> {
        let mut moved = false;
        let mut grow = |memory: &mut Memory, bytes: usize, what: &str| -> Result<()> {
            if memory.len() < bytes {
                *memory = device.allocate(bytes.next_power_of_two(), what)?;
                moved = true;
            }
            Ok(())
        };
        grow(&mut self.upload, upload, "a step's tables")?;
        grow(&mut self.masks, masks, "masks")?;
        grow(&mut self.results, results.logits, "a step's results")?;
        if self.up.len() < upload {
            self.up = Pinned::zeroed(device, upload.next_power_of_two())?;
        }
        if self.down.len() < results.end {
            self.down = Pinned::zeroed(device, results.end.next_power_of_two())?;
        }
        Ok(moved)
    }

    /// Value `index` of those that have come down from byte `place` on.
    fn word(&self, place: usize, index: usize) -> u32 {
        let at = place + 4 * index;
        self.down.bytes()[at..at + 4].try_into().map_or(0, u32::from_le_bytes)
    }

    fn float(&self, place: usize, index: usize) -> f32 {
        f32::from_bits(self.word(place, index))
    }
}

impl CudaExecutable {
    pub fn new(parts: Parts, overlap: bool) -> Result<CudaExecutable> {
        let device = &parts.device;
        let stream = device.stream()?;
        let mut executable = CudaExecutable {
            graphs: HashMap::new(),
            lanes: [Lane::new(device)?, Lane::new(device)?],
            stream: if overlap { stream.overlapping()? } else { stream },
            open: VecDeque::new(),
            submitted: 0,
            open_slots: vec![false; parts.limits.step.slots as usize],
            last_wants: Vec::new(),
            broken: None,
            parts,
        };
        executable.capture_all()?;
        Ok(executable)
    }

    /// Captures the launches of steps in which all sessions decode, for each size of batch.
    fn capture_all(&mut self) -> Result<()> {
        let limits = &self.parts.limits;
        let Some(most) = limits.bucket_rows else { return Ok(()) };
        let started = Instant::now();
        let largest = StepData::empty(Bucket::of(most, 1, most), limits);
        let StepLimits { rows, model_len, page_tokens, ref groups, .. } = limits.step;
        let pages = rows as usize * ((model_len / page_tokens) as usize + 2) * groups.len();
        let bytes = largest.upload.len() + 4 * pages.min(MOST_PAGES);
        let results = Results::of(&largest, limits.vocab());
        for lane in &mut self.lanes {
            lane.fit_bytes(&self.parts.device, bytes, 0, results)?;
        }
        for rows in Bucket::sizes(most) {
            let bucket = Bucket::of(rows, 1, most);
            for lane in 0..LANES {
                let step = StepData::empty(bucket, &self.parts.limits);
                self.capture(lane, bucket, &step)?;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(graphs = self.graphs.len(), seconds, "Captured the launches of decoding steps.");
        Ok(())
    }

    fn capture(&mut self, lane: usize, bucket: Bucket, step: &StepData) -> Result<()> {
        let graph = self.stream.capture(|| {
            self.queue_carries(lane, step)?;
            self.queue_tokens(lane, step)?;
            let results = Results::of(step, self.parts.limits.vocab());
            self.queue_wants(lane, step, results, 0..bucket.rows)
        })?;
        self.graphs.insert((lane, bucket), graph);
        Ok(())
    }

    fn position(&self, ticket: Ticket) -> Result<usize> {
        self.open
            .iter()
            .position(|pending| pending.ticket == ticket)
            .ok_or_else(|| Error::contract(format!("ticket {} is not open", ticket.0)))
    }

    /// Does what can only go wrong for good.
    fn or_break<T>(&mut self, work: impl FnOnce(&mut CudaExecutable) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        work(self).map_err(|error| {
            let error = Error::new(ErrorKind::Device, format!("{}: the model must be loaded again", error.message()));
            self.broken = Some(error.clone());
            error
        })
    }

    /// Launches what doesn't wait for a mask, in order.
    fn launch_ready(&mut self) -> Result<()> {
        self.parts.device.bind()?;
        for index in 0..self.open.len() {
            let Pending { stage, lane, .. } = self.open[index];
            if stage == Stage::Waiting {
                self.prepare(&self.open[index])?;
                match self.open[index].step.bucket {
                    Some(bucket) => self.launch_bucket(index, bucket)?,
                    None => {
                        let step = &self.open[index].step;
                        self.queue_carries(lane, step)?;
                        self.queue_tokens(lane, step)?;
                        self.open[index].stage = Stage::TokensLaunched;
                    }
                }
            }
            let pending = &self.open[index];
            if pending.step.lacks_mask().is_some() {
                return Ok(());
            }
            if pending.stage == Stage::TokensLaunched {
                self.launch_wants(index)?;
                self.open[index].stage = Stage::Launched;
            }
        }
        Ok(())
    }

    /// Queues what differs from step to step: its tables go up, pages are copied and slots opened.
    fn prepare(&self, pending: &Pending) -> Result<()> {
        let (step, lane, stream) = (&pending.step, &self.lanes[pending.lane], &self.stream);
        let (places, upload) = (&step.places, lane.upload.address());
        let at = |place: usize| upload + place as u64;
        stream.record(&lane.start)?;
        // SAFETY: the lane was made as large as the step, and its pinned memory is left alone until the step's end
        // was waited for.
        unsafe { stream.upload(upload, &lane.up.bytes()[..step.upload.len()])? };
        for &(group, from, to) in &step.copies {
            let group = &self.parts.pages.groups[group as usize];
            // SAFETY: both pages exist, as was checked when the step was taken.
            unsafe { stream.copy(group.address(to), group.address(from), group.page_bytes)? };
        }
        if step.opened.is_empty() {
            return Ok(());
        }
        let slots = &self.parts.slots;
        slots.copy_lists(stream, &step.opened, at(places.lists))?;
        let arguments = Arguments::new().address(at(places.opened)).address(at(places.history));
        let arguments = arguments.address(slots.address()).address(slots.seen_address());
        let shape = Shape::new((step.opened.len(), 1, 1), 256);
        // SAFETY: the arguments are those of `slot_open`; slots and tokens were checked when the step was taken.
        unsafe { stream.launch(&self.parts.kernels.open, shape, &arguments.int(self.parts.limits.vocab())) }
    }

    /// Launches a decoding step as the graph of its bucket, which is captured if no step was in it so far.
    fn launch_bucket(&mut self, index: usize, bucket: Bucket) -> Result<()> {
        let lane = self.open[index].lane;
        if !self.graphs.contains_key(&(lane, bucket)) {
            let started = Instant::now();
            let step = StepData::empty(bucket, &self.parts.limits);
            self.capture(lane, bucket, &step)?;
            let (Bucket { rows, parts }, seconds) = (bucket, started.elapsed().as_secs_f64());
            tracing::debug!(rows, parts, seconds, "Captured the launches of decoding steps.");
        }
        // SAFETY: the graph was captured for this lane, whose memory hasn't moved since, and for steps whose tables
        // lie as this one's do.
        unsafe { self.stream.launch_graph(&self.graphs[&(lane, bucket)])? };
        self.bring_down(index)?;
        self.open[index].stage = Stage::Launched;
        Ok(())
    }

    /// Queues what fills in the tokens that the step before samples.
    fn queue_carries(&self, lane: usize, step: &StepData) -> Result<()> {
        if step.carries == 0 {
            return Ok(());
        }
        let at = |place: usize| self.lanes[lane].upload.address() + place as u64;
        let before = &self.lanes[(lane + 1) % LANES];
        let arguments = Arguments::new().address(at(step.places.carries)).int(step.carries);
        let arguments = arguments.address(before.results.address()).address(at(step.places.tokens));
        let shape = Shape::new((step.carries.div_ceil(128), 1, 1), 128);
        // SAFETY: the arguments are those of `carry`; its tokens and the wants of the step before were checked when
        // the step was taken.
        unsafe { self.stream.launch(&self.parts.kernels.carry, shape, &arguments) }
    }

    /// Queues a step's stage of tokens.
    fn queue_tokens(&self, lane: usize, step: &StepData) -> Result<()> {
        if step.tokens == 0 {
            return Ok(());
        }
        let pass = self.pass(lane, step, 0..step.tokens);
        self.parts.plan.tokens.iter().try_for_each(|op| op.launch(&pass))
    }

    fn pass<'a>(&'a self, lane: usize, step: &'a StepData, rows: Range<usize>) -> Pass<'a> {
        Pass {
            stream: &self.stream,
            step,
            upload: self.lanes[lane].upload.address(),
            rows: rows.len(),
            first_want: rows.start,
            dense: self.parts.plan.is_dense(rows.len()),
            bucket: step.bucket,
        }
    }

    /// Queues a pass over some of a step's wants.
    fn queue_wants(&self, lane: usize, step: &StepData, results: Results, wants: Range<usize>) -> Result<()> {
        let (parts, vocab) = (&self.parts, self.parts.limits.vocab());
        let pass = self.pass(lane, step, wants.clone());
        parts.plan.wanted.iter().try_for_each(|op| op.launch(&pass))?;
        let (lane, logits) = (&self.lanes[lane], parts.plan.logits);
        let result = |place: usize, bytes: usize| lane.results.address() + (place + wants.start * bytes) as u64;
        let arguments = Arguments::new()
            .address(lane.upload.address() + (step.places.wants + wants.start * WANT_BYTES) as u64)
            .address(parts.slots.address())
            .address(parts.slots.seen_address())
            .address(lane.masks.address())
            .address(logits.address)
            .int(logits.stride)
            .int(vocab)
            .address(parts.scratch.address())
            .address(result(0, 4))
            .address(result(results.logprobs, 4))
            .address(result(results.top_tokens, 4 * results.top_stride))
            .address(result(results.top_logprobs, 4 * results.top_stride))
            .int(results.top_stride);
        let threads = (vocab / 64).next_power_of_two().clamp(32, 512);
        // SAFETY: the arguments are those of `answer`; the scratch memory has room for a pass, the lane for the
        // step, and what the wants name was checked when the step was taken.
        unsafe { self.stream.launch(&parts.kernels.answer, Shape::new((wants.len(), 1, 1), threads), &arguments) }
    }

    /// Queues a step's stage of wants, in passes, and has its results come down.
    fn launch_wants(&mut self, index: usize) -> Result<()> {
        let Pending { step, lane, results, .. } = &self.open[index];
        let (lane, results) = (*lane, *results);
        let (logits, vocab) = (self.parts.plan.logits, self.parts.limits.vocab());
        // SAFETY: the lane has room for all masks of the step; this memory isn't pinned, so that the driver has
        // copied it when the call returns.
        unsafe { self.stream.upload(self.lanes[lane].masks.address(), &step.mask_bytes())? };
        let mut logits_place = results.logits;
        for wants in passes(step, self.parts.plan.wants) {
            self.queue_wants(lane, step, results, wants.clone())?;
            let with_logits = |&(_, want): &(usize, usize)| step.wants[want].has(Want::LOGITS);
            for (row, _) in wants.enumerate().filter(with_logits) {
                let from = logits.address + 4 * (row * logits.stride) as u64;
                let to = &mut self.lanes[lane].down.bytes_mut()[logits_place..logits_place + 4 * vocab];
                // SAFETY: the row is one of the pass; what comes down is read when the step's end was waited for.
                unsafe { self.stream.download(to, from)? };
                logits_place += 4 * vocab;
            }
        }
        self.bring_down(index)
    }

    /// Has a step's results come down, and marks its end.
    fn bring_down(&mut self, index: usize) -> Result<()> {
        let Pending { lane, results, .. } = &self.open[index];
        let lane = &mut self.lanes[*lane];
        let from = lane.results.address();
        // SAFETY: the lane was made as large as the step; what comes down is read when its end was waited for.
        unsafe { self.stream.download(&mut lane.down.bytes_mut()[..results.logits], from)? };
        self.stream.record(&lane.end)
    }
}

/// The wants of a step in passes of at most `most`, of which none samples twice with a slot: a want may depend on
/// what the one before it sampled.
fn passes(step: &StepData, most: usize) -> Vec<Range<usize>> {
    let mut passes = Vec::new();
    let (mut start, mut slots) = (0, Vec::new());
    for want in 0..step.wants.len() {
        let slot = step.sampled_slot(want);
        if want - start == most || slot.is_some_and(|slot| slots.contains(&slot)) {
            passes.push(start..want);
            start = want;
            slots.clear();
        }
        slots.extend(slot);
    }
    if start < step.wants.len() {
        passes.push(start..step.wants.len());
    }
    passes
}

impl Executable for CudaExecutable {
    fn info(&self) -> ExecutableInfo {
        let Parts { plan, pages, slots, scratch, weights, .. } = &self.parts;
        ExecutableInfo {
            max_in_flight: LANES as u32,
            kv_pages: pages.groups.iter().map(|group| group.pages).collect(),
            weight_bytes: weights.iter().map(|memory| memory.len() as u64).sum(),
            kv_bytes: pages.byte_len() as u64,
            workspace_bytes: (plan.workspace_bytes() + slots.byte_len() + scratch.len()) as u64,
            batch_invariant: plan.batch_invariant,
            virtual_time: false,
        }
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.open.len() >= LANES {
            return Err(Error::contract(format!("{LANES} steps are in flight already: wait for one first")));
        }
        let mut data = StepData::read(step, &self.parts.limits, &self.open_slots, &self.last_wants)?;
        let results = Results::of(&data, self.parts.limits.vocab());
        let lane = self.submitted as usize % LANES;
        if self.lanes[lane].fit(&self.parts.device, &data, results)? {
            // They have the old addresses.
            self.graphs.clear();
        }
        let opened = data.places.opened..data.places.history;
        self.parts.slots.prepare(&data.opened, &mut data.upload[opened])?;
        self.lanes[lane].up.bytes_mut()[..data.upload.len()].copy_from_slice(&data.upload);

        data.opened.iter().for_each(|open| self.open_slots[open.number as usize] = true);
        self.last_wants.clear();
        self.last_wants.extend(data.wants.iter().map(|want| want.has(Want::SAMPLE)));
        let ticket = Ticket(self.submitted);
        self.submitted += 1;
        self.open.push_back(Pending { ticket, lane, step: data, results, stage: Stage::Waiting });
        self.or_break(CudaExecutable::launch_ready)?;
        Ok(ticket)
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        let position = self.position(ticket)?;
        if self.open[position].stage == Stage::Launched {
            return Err(Error::contract(format!("ticket {} waits for no mask", ticket.0)));
        }
        self.open[position].step.provide(masks, &self.parts.limits.step)?;
        self.or_break(CudaExecutable::launch_ready)
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        if self.position(ticket)? != 0 {
            return Err(Error::contract(format!("ticket {} is waited for before older ones", ticket.0)));
        }
        if let Some(want) = self.open[0].step.lacks_mask() {
            return Err(Error::contract(format!("want {want} waits for a mask that was not provided")));
        }
        check_room(&self.open[0].step, outputs, self.parts.limits.vocab())?;
        let number = self.open[0].step.number;
        let lane = self.open[0].lane;
        let waited = self.or_break(|executable| {
            let Lane { start, end, .. } = &executable.lanes[lane];
            end.wait()?;
            end.seconds_since(start)
        });
        outputs.busy_s = waited.map_err(|error| error.within(format!("step {number}")))?;
        if let Some(Pending { step, results, .. }) = self.open.pop_front() {
            give(&step, &results, &self.lanes[lane], outputs, self.parts.limits.vocab());
        }
        Ok(())
    }
}

impl Drop for CudaExecutable {
    fn drop(&mut self) {
        // Nothing may be freed that a queue still uses. If the device has failed there is no queue any more.
        let _ = self.stream.wait();
    }
}

/// Checks that there is room for what `step` wants.
fn check_room(step: &StepData, outputs: &StepOutputs<'_>, vocab: usize) -> Result<()> {
    let wants = &step.wants;
    let last = |flags: u32| wants.iter().rposition(|want| want.flags & flags != 0).map_or(0, |last| last + 1);
    let top = wants.iter().rposition(|want| want.top > 0).map_or(0, |last| last + 1);
    let stride = outputs.top_stride as usize;
    let rows = wants.iter().filter(|want| want.has(Want::LOGITS)).count();
    let needed = [
        ("tokens", outputs.tokens.len(), Some(last(Want::SAMPLE))),
        ("logprobs", outputs.logprobs.len(), Some(last(Want::LOGPROB | Want::SCORE))),
        ("top_tokens", outputs.top_tokens.len(), top.checked_mul(stride)),
        ("top_logprobs", outputs.top_logprobs.len(), top.checked_mul(stride)),
        ("logits", outputs.logits.len(), rows.checked_mul(vocab)),
        ("top_stride", stride, Some(wants.iter().map(|want| want.top as usize).max().unwrap_or(0))),
    ];
    match needed.into_iter().find(|(_, given, needed)| needed.is_none_or(|needed| *given < needed)) {
        Some((name, given, needed)) => {
            let needed = needed.unwrap_or(usize::MAX);
            Err(Error::contract(format!("the outputs' {name} is {given}, the step's wants need {needed}")))
        }
        None => Ok(()),
    }
}

/// Writes what has come down to where it is wanted.
fn give(step: &StepData, results: &Results, lane: &Lane, outputs: &mut StepOutputs<'_>, vocab: usize) {
    let stride = outputs.top_stride as usize;
    let mut row = 0;
    for (index, want) in step.wants.iter().enumerate() {
        let token = lane.word(0, index);
        if want.has(Want::SAMPLE) {
            outputs.tokens[index] = token;
        }
        let samples = want.has(Want::SAMPLE) && token != NO_TOKEN;
        if want.has(Want::SCORE) || (want.has(Want::LOGPROB) && samples) {
            outputs.logprobs[index] = lane.float(results.logprobs, index);
        }
        for place in 0..want.top as usize {
            let from = index * results.top_stride + place;
            outputs.top_tokens[index * stride + place] = lane.word(results.top_tokens, from);
            outputs.top_logprobs[index * stride + place] = lane.float(results.top_logprobs, from);
        }
        if want.has(Want::LOGITS) {
            for (column, logit) in outputs.logits[row * vocab..(row + 1) * vocab].iter_mut().enumerate() {
                *logit = lane.float(results.logits, row * vocab + column);
            }
            row += 1;
        }
    }
}
