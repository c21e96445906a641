//! Speculative plugins, as the step loop uses them.

use std::{ffi::c_void, ptr::NonNull};

use abi_stable::std_types::RSlice;
use torus_abi::{
    fault::{Fault, FaultCode},
    speculative::{Sequence, SpeculativeDescription, SpeculativeOptions},
    table::{ProposeInput, ProposeOutput, Reply},
};

use crate::{
    CallError,
    plugin::{answer, body, request},
};

/// The speculative calls of a plugin.
#[derive(Clone, Debug)]
pub struct SpeculativeInterface {
    pub(crate) plugin: String,
    pub(crate) open: unsafe extern "C" fn(RSlice<'_, u8>, *mut *mut c_void) -> Reply,
    pub(crate) calls: SpeculativeCalls,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SpeculativeCalls {
    pub describe: unsafe extern "C" fn(*const c_void) -> Reply,
    pub propose: unsafe extern "C" fn(*mut c_void, *const ProposeInput, *mut ProposeOutput) -> u32,
    pub forget: unsafe extern "C" fn(*mut c_void, u64),
    pub close: unsafe extern "C" fn(*mut c_void),
}

impl SpeculativeInterface {
    /// Opens a speculator and asks what it wants.
    pub fn open(&self, options: &SpeculativeOptions) -> Result<Speculator, CallError> {
        let request = request(&self.plugin, "open", options)?;
        let malformed =
            |call, message: String| CallError::MalformedAnswer { plugin: self.plugin.clone(), call, message };
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a valid place for the result.
        let reply = unsafe { (self.open)(request.as_slice().into(), &mut handle) };
        body(&self.plugin, reply)?;
        let handle = NonNull::new(handle)
            .ok_or_else(|| malformed("open", "it said 'done' and gave no speculator".to_owned()))?;
        let mut speculator = Speculator {
            plugin: self.plugin.clone(),
            calls: self.calls,
            handle,
            vocab: options.vocab,
            description: SpeculativeDescription { draft_tokens: 0 },
            rows: Rows::default(),
        };
        // SAFETY: the handle was just opened.
        let reply = unsafe { (self.calls.describe)(handle.as_ptr()) };
        speculator.description = answer(&self.plugin, "describe", reply)?;
        let (wants, most) = (speculator.description.draft_tokens, options.max_draft_tokens);
        if wants > most {
            return Err(malformed("describe", format!("it wants to propose {wants} tokens, and {most} are possible")));
        }
        Ok(speculator)
    }
}

/// An opened speculator. It keeps its arrays from step to step: once they have grown, a step allocates nothing.
#[derive(Debug)]
pub struct Speculator {
    plugin: String,
    calls: SpeculativeCalls,
    handle: NonNull<c_void>,
    vocab: u64,
    description: SpeculativeDescription,
    rows: Rows,
}

/// The arrays of one call. The pointers are dangling between calls, and never read then.
#[derive(Debug, Default)]
struct Rows {
    ids: Vec<u64>,
    tokens: Vec<*const u32>,
    lengths: Vec<usize>,
    limits: Vec<u32>,
    drafts: Vec<u32>,
    counts: Vec<u32>,
}

// SAFETY: the table's contract is that a handle may move between threads; `&mut` sees to it that one at a time uses it.
// The pointers in `rows` are not followed outside of `propose`.
unsafe impl Send for Speculator {}

/// What was proposed in a step.
#[derive(Clone, Copy, Debug)]
pub struct Drafts<'a> {
    stride: usize,
    tokens: &'a [u32],
    counts: &'a [u32],
}

impl<'a> Drafts<'a> {
    /// The tokens proposed for the sequence of row `row`.
    pub fn row(&self, row: usize) -> &'a [u32] {
        &self.tokens[row * self.stride..][..self.counts[row] as usize]
    }
}

impl Speculator {
    pub fn description(&self) -> SpeculativeDescription {
        self.description
    }

    /// Asks for continuations of sequences, each with the number of tokens that may be proposed for it. What the plugin
    /// answers is checked: no more tokens than allowed, all below the vocabulary's size.
    ///
    /// # Errors
    /// [`CallError`] when the plugin fails or breaks these rules; the step can go on without drafts.
    pub fn propose<'s>(
        &mut self,
        sequences: impl IntoIterator<Item = (Sequence<'s>, u32)>,
    ) -> Result<Drafts<'_>, CallError> {
        let stride = self.description.draft_tokens as usize;
        let rows = &mut self.rows;
        rows.ids.clear();
        rows.tokens.clear();
        rows.lengths.clear();
        rows.limits.clear();
        for (sequence, limit) in sequences {
            rows.ids.push(sequence.id);
            rows.tokens.push(sequence.tokens.as_ptr());
            rows.lengths.push(sequence.tokens.len());
            rows.limits.push(limit.min(stride as u32));
        }
        let count = rows.ids.len();
        rows.drafts.resize(count * stride, 0);
        rows.counts.clear();
        rows.counts.resize(count, 0);
        let input = ProposeInput {
            struct_size: size_of::<ProposeInput>(),
            rows: count,
            ids: rows.ids.as_ptr(),
            tokens: rows.tokens.as_ptr(),
            lengths: rows.lengths.as_ptr(),
            limits: rows.limits.as_ptr(),
        };
        let mut output = ProposeOutput {
            struct_size: size_of::<ProposeOutput>(),
            stride,
            tokens: rows.drafts.as_mut_ptr(),
            counts: rows.counts.as_mut_ptr(),
        };
        // SAFETY: all arrays are as long as `rows` and `stride` say, the sequences' tokens are borrowed for `'s`, and
        // the handle is open and used by this thread alone.
        let status = unsafe { (self.calls.propose)(self.handle.as_ptr(), &input, &mut output) };
        self.check(status)?;
        let rows = &self.rows;
        Ok(Drafts { stride, tokens: &rows.drafts, counts: &rows.counts })
    }

    fn check(&self, status: u32) -> Result<(), CallError> {
        if status != 0 {
            let message = "it could not propose; its message is in the log".to_owned();
            let fault = Fault { code: FaultCode::from_number(status), message };
            return Err(CallError::Fault { plugin: self.plugin.clone(), fault });
        }
        let malformed =
            |message| Err(CallError::MalformedAnswer { plugin: self.plugin.clone(), call: "propose", message });
        let (rows, stride) = (&self.rows, self.description.draft_tokens as usize);
        for (row, (count, limit)) in rows.counts.iter().zip(&rows.limits).enumerate() {
            if count > limit {
                return malformed(format!("{count} tokens for row {row}, where {limit} were allowed"));
            }
            let draft = &rows.drafts[row * stride..][..*count as usize];
            if let Some(token) = draft.iter().find(|token| u64::from(**token) >= self.vocab) {
                return malformed(format!("token {token} is not below the vocabulary's size of {}", self.vocab));
            }
        }
        Ok(())
    }

    /// Tells the plugin that a sequence has ended.
    pub fn forget(&mut self, id: u64) {
        // SAFETY: the handle is open and used by this thread alone.
        unsafe { (self.calls.forget)(self.handle.as_ptr(), id) }
    }
}

impl Drop for Speculator {
    fn drop(&mut self) {
        // SAFETY: `open` made the handle and this is the only place that closes it.
        unsafe { (self.calls.close)(self.handle.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use torus_abi::{author::Speculative, speculative::ProposeBatch};

    use super::*;
    use crate::{Origin, Plugin};

    /// Counts up from the last token; what it does wrong is chosen by that token.
    struct Counting;

    const VOCAB: u64 = 100;
    const PANICS_AT: u32 = 50;

    torus_abi::declare_plugin! { name: "counting", description: "A test", speculative: Counting }

    impl Speculative for Counting {
        fn open(options: &SpeculativeOptions) -> Result<Self, Fault> {
            match options.parameters.get("fail") {
                Some(reason) => Err(Fault::unsupported(format!("fail: {reason}"))),
                None => Ok(Self),
            }
        }

        fn describe(&self) -> SpeculativeDescription {
            SpeculativeDescription { draft_tokens: 3 }
        }

        fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault> {
            for (sequence, mut draft) in batch.rows() {
                let last = sequence.tokens[sequence.tokens.len() - 1];
                assert_ne!(last, PANICS_AT, "lost");
                draft.extend(&[last + 1, last + 2, last + 3, last + 4]);
            }
            Ok(())
        }
    }

    fn options() -> SpeculativeOptions {
        SpeculativeOptions {
            vocab: VOCAB,
            context_length: 64,
            max_sequences: 4,
            max_draft_tokens: 4,
            parameters: Default::default(),
        }
    }

    fn interface() -> SpeculativeInterface {
        let plugin = Plugin::new(PLUGIN, Origin::Linked).unwrap();
        plugin.speculative().unwrap().clone()
    }

    fn propose<'s>(speculator: &'s mut Speculator, tokens: &[u32], limit: u32) -> Result<Drafts<'s>, CallError> {
        speculator.propose([(Sequence { id: 1, tokens }, limit)])
    }

    #[test]
    fn proposals_cross_within_their_limits() {
        let mut speculator = interface().open(&options()).unwrap();
        let drafts = speculator
            .propose([(Sequence { id: 1, tokens: &[4, 5] }, 2), (Sequence { id: 2, tokens: &[7] }, 9)])
            .unwrap();
        assert_eq!((drafts.row(0), drafts.row(1)), (&[6, 7][..], &[8, 9, 10][..]));
        let drafts = propose(&mut speculator, &[1], 1).unwrap();
        assert_eq!(drafts.row(0), [2]);
    }

    #[test]
    fn what_breaks_the_rules_is_an_error_with_the_plugins_name_and_ends_nothing() {
        let mut speculator = interface().open(&options()).unwrap();
        let outside = propose(&mut speculator, &[98], 3).unwrap_err();
        assert!(outside.to_string().contains("'counting'") && outside.to_string().contains("token 100"), "{outside}");
        let panicked = propose(&mut speculator, &[PANICS_AT], 3).unwrap_err();
        assert!(matches!(panicked, CallError::Fault { ref fault, .. } if fault.code == FaultCode::Internal));
        assert_eq!(propose(&mut speculator, &[1], 1).unwrap().row(0), [2]);
    }

    #[test]
    fn a_speculator_that_cannot_serve_says_why() {
        let parameters = [("fail".to_owned(), "today".into())].into();
        let refused = interface().open(&SpeculativeOptions { parameters, ..options() }).unwrap_err();
        assert!(refused.to_string().contains("today"), "{refused}");
        let narrow = interface().open(&SpeculativeOptions { max_draft_tokens: 2, ..options() }).unwrap_err();
        assert!(narrow.to_string().contains("wants to propose 3"), "{narrow}");
    }
}
