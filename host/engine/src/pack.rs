//! Fills the step buffer of a batch.

use torus_pjrt::PjrtError;
use torus_sched::{Batch, Row};

use crate::{
    load::Loaded,
    program::{Field, Rows, StepBuffer, flag},
    request::RequestState,
    requests::{Choice, Requests},
};

/// Which program a step was packed for. Its bytes are in [`Loaded::buffer`].
pub(crate) struct Packed {
    /// Index of the bucket, for [`Rows::Sampled`].
    pub bucket: usize,
    pub rows: Rows,
    /// Padding tokens.
    pub padding: usize,
}

/// Packs a batch of so many tokens. Page-table entries that do not fit the buffer are loaded first.
pub(crate) fn pack(
    batch: &Batch,
    tokens: usize,
    requests: &Requests,
    loaded: &mut Loaded,
) -> Result<Packed, PjrtError> {
    let wants_all = |row: &Row| {
        let may_want = requests.slot(row).is_some_and(|slot| slot.wants_prompt_logprobs);
        let request = requests.of_row(row).filter(|_| may_want);
        request.is_some_and(|r| (row.start..row.start + row.len).any(|at| r.wants_prompt_logprob_after(at)))
    };
    let rows = if batch.rows.iter().any(wants_all) { Rows::All } else { Rows::Sampled };
    let fitting = loaded.buckets.iter().position(|bucket| bucket.tokens() >= tokens);
    let bucket = fitting.unwrap_or(loaded.buckets.len() - 1);
    let deltas = loaded.program(rows, bucket).layout.deltas;
    load_new_pages(batch, loaded, deltas)?;
    let mut memory = std::mem::take(&mut loaded.buffer);
    let program = loaded.program(rows, bucket);
    let padding = program.tokens() - tokens;
    let buffer = StepBuffer::new(&program.layout, &mut memory, loaded.max_running as i32, loaded.vocab as i32);
    let mut packer = Packer { buffer, loaded, rows, page_size: loaded.shape.page_size as u32, token: 0 };
    for (index, row) in batch.rows.iter().enumerate() {
        packer.add_tokens(index, row);
        packer.add_row(index, row, requests);
        packer.token += row.len;
    }
    packer.add_ends(batch);
    loaded.buffer = memory;
    Ok(Packed { bucket, rows, padding })
}

/// Notes the pages that came to each sequence, and puts them into the device's table: with the step buffer, which has
/// room for `room` of them, or before.
fn load_new_pages(batch: &Batch, loaded: &mut Loaded, room: usize) -> Result<(), PjrtError> {
    let entries = &mut loaded.pending_pages;
    entries.clear();
    for row in batch.rows.iter().filter(|row| !row.new_pages.is_empty()) {
        let slot = row.slot.0 as usize;
        let pages = &mut loaded.pages[slot];
        for (index, page) in &row.new_pages {
            if *index == pages.len() {
                pages.push(page.0);
            } else {
                pages[*index] = page.0;
            }
            entries.push(((slot * loaded.pages_per_slot + index) as u32, page.0 as i32));
        }
    }
    // Most steps bring a page or two, which travel in the step buffer; a long cached prefix does not fit there.
    if loaded.pending_pages.len() > room {
        let entries = std::mem::take(&mut loaded.pending_pages);
        loaded.state.load_pages(&entries)?;
    }
    Ok(())
}

struct Packer<'a> {
    buffer: StepBuffer<'a>,
    loaded: &'a Loaded,
    rows: Rows,
    page_size: u32,
    /// Index of the row's first token.
    token: usize,
}

impl Packer<'_> {
    /// What attention needs to know of a row.
    fn add_tokens(&mut self, index: usize, row: &Row) {
        let slot = row.slot.0 as usize;
        let pages = &self.loaded.pages[slot];
        for offset in 0..row.len {
            let (at, position) = (self.token + offset, (row.start + offset) as u32);
            // The token that was last sampled in slot k is named by -k-1.
            let source = row.tokens.get(offset).map_or(-(slot as i32) - 1, |token| *token as i32);
            let kv_slot = pages[(position / self.page_size) as usize] * self.page_size + position % self.page_size;
            self.buffer.set(Field::TokenSrc, at, source);
            self.buffer.set(Field::Positions, at, position as i32);
            self.buffer.set(Field::TokenSeq, at, index as i32);
            self.buffer.set(Field::KvSlot, at, kv_slot as i32);
        }
        self.buffer.set(Field::CuQLens, index + 1, (self.token + row.len) as i32);
        self.buffer.set(Field::KvLens, index, (row.start + row.len) as i32);
        self.buffer.set(Field::PageBegin, index, (slot * self.loaded.pages_per_slot) as i32);
    }

    /// What sampling needs to know of a row, and of its prompt's logprobs.
    fn add_row(&mut self, index: usize, row: &Row, requests: &Requests) {
        let Some(slot) = requests.slot(row) else { return };
        let last = self.token + row.len - 1;
        let at = match self.rows {
            Rows::Sampled => index,
            Rows::All => last,
        };
        if self.rows == Rows::All {
            (self.token..=last).for_each(|token| self.buffer.set(Field::LogitRows, token, token as i32));
            if let Some(request) = requests.of_row(row).filter(|_| slot.wants_prompt_logprobs) {
                self.add_targets(row, request);
            }
        }
        self.buffer.set(Field::LogitRows, at, last as i32);
        if row.samples.is_some() {
            self.buffer.set(Field::Slots, at, row.slot.0 as i32);
            if slot.choice.flags != 0 {
                self.add_choice(at, row, &slot.choice);
            }
        }
    }

    /// The tokens of a prompt whose logprobs are wanted.
    fn add_targets(&mut self, row: &Row, request: &RequestState) {
        for offset in 0..row.len {
            let position = row.start + offset;
            if request.wants_prompt_logprob_after(position) {
                self.buffer.set(Field::Target, self.token + offset, request.prompt[position + 1] as i32);
                self.buffer.raise(flag::LOGPROBS);
                self.buffer.raise(if request.logprobs.top_n > 0 { flag::TOP_LOGPROBS } else { 0 });
            }
        }
    }

    fn add_choice(&mut self, at: usize, row: &Row, choice: &Choice) {
        self.buffer.raise(choice.flags);
        if choice.needs(flag::PENALTIES) {
            self.buffer.set_f32(Field::RepetitionPenalty, at, choice.repetition_penalty);
            self.buffer.set_f32(Field::FrequencyPenalty, at, choice.frequency_penalty);
            self.buffer.set_f32(Field::PresencePenalty, at, choice.presence_penalty);
        }
        // Rows of slots whose request has no bias hold what an earlier request left; its flag may be raised by others.
        if choice.needs(flag::BIAS) {
            self.buffer.set(Field::BiasSlots, at, row.slot.0 as i32);
        }
        if !choice.needs(flag::SAMPLE) {
            return;
        }
        self.buffer.set_f32(Field::Temperature, at, choice.temperature);
        self.buffer.set_f32(Field::MinP, at, choice.min_p);
        if choice.needs(flag::TOP_K) {
            self.buffer.set(Field::TopK, at, choice.top_k);
        }
        if choice.needs(flag::TOP_P) {
            self.buffer.set_f32(Field::TopP, at, choice.top_p);
        }
        self.buffer.set(Field::SeedLow, at, choice.seed as u32 as i32);
        self.buffer.set(Field::SeedHigh, at, (choice.seed >> 32) as u32 as i32);
        self.buffer.set(Field::SamplePosition, at, (row.start + row.len) as i32);
    }

    /// What concerns the batch as a whole.
    fn add_ends(&mut self, batch: &Batch) {
        let (total, rows) = (self.token as i32, batch.rows.len());
        // Pieces of prompts come last and need no logits, but for the last piece.
        let sampled = batch.rows.iter().rposition(|row| row.samples.is_some()).map_or(1, |last| last + 1);
        self.buffer.field(Field::CuQLens)[rows + 1..].fill(total);
        self.buffer.set(Field::NumSeqs, 0, rows as i32);
        self.buffer.set(Field::NumTokens, 0, total);
        self.buffer.set(Field::NumRows, 0, if self.rows == Rows::All { total } else { sampled as i32 });
        for (i, (index, page)) in self.loaded.pending_pages.iter().enumerate() {
            self.buffer.set(Field::DeltaIndex, i, *index as i32);
            self.buffer.set(Field::DeltaPage, i, *page);
        }
    }
}
