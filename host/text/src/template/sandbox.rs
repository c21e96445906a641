//! Running the template engine on code that is not trusted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use crate::TextError;

/// Renderings past their deadline that may go on before more are refused.
const MAX_OVERDUE: usize = 2;

/// Runs jobs of the template engine, each on a thread of its own.
///
/// The engine recurses over nested expressions and values, also where it does not count (dropping a list of lists of
/// lists …), so the stack has to be as large as sources and values can be deep; of a large stack only what is used takes
/// memory. And its accounting has gaps, so that a job may take far longer than its fuel should last: then nobody waits
/// for it any more, and a template that does so again and again is not run again before its threads have ended.
pub(super) struct Sandbox {
    pub stack_bytes: usize,
    pub deadline: Duration,
    pub overdue: Arc<AtomicUsize>,
}

impl Sandbox {
    pub fn new(stack_bytes: usize, deadline: Duration) -> Self {
        Self { stack_bytes, deadline, overdue: Arc::default() }
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, TextError> {
        if self.overdue.load(Ordering::Acquire) >= MAX_OVERDUE {
            return Err(TextError::TemplateLimit { limit: "time" });
        }
        let ticket = Ticket { is_settled: Arc::default(), overdue: self.overdue.clone() };
        let is_settled = ticket.is_settled.clone();
        let (sender, receiver) = mpsc::sync_channel(1);
        let body = move || {
            let _ticket = ticket;
            // If nobody waits for it any more, the result is dropped.
            let _ = sender.send(job());
        };
        let failed = |reason: String| TextError::Render(format!("the template engine {reason}"));
        thread::Builder::new()
            .name("chat-template".into())
            .stack_size(self.stack_bytes)
            .spawn(body)
            .map_err(|error| failed(format!("got no thread: {error}")))?;
        receiver.recv_timeout(self.deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                self.overdue.fetch_add(1, Ordering::AcqRel);
                if is_settled.swap(true, Ordering::AcqRel) {
                    // It ended just now; its ticket did not see that it was overdue.
                    self.overdue.fetch_sub(1, Ordering::AcqRel);
                }
                TextError::TemplateLimit { limit: "time" }
            }
            RecvTimeoutError::Disconnected => failed("panicked".into()),
        })
    }
}

/// Held by a running job. Whoever settles it second, the job that ends or the caller that gives up, takes the job off the
/// count of overdue ones.
struct Ticket {
    is_settled: Arc<AtomicBool>,
    overdue: Arc<AtomicUsize>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_settled.swap(true, Ordering::AcqRel) {
            self.overdue.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_panics_come_back() {
        let sandbox = Sandbox::new(1 << 20, Duration::from_secs(60));
        assert_eq!(sandbox.run(|| 7).unwrap(), 7);
        let error = sandbox.run(|| panic!("as a bug would")).unwrap_err();
        assert!(matches!(&error, TextError::Render(reason) if reason.contains("panicked")), "{error}");
        assert_eq!(sandbox.run(|| 8).unwrap(), 8);
    }

    #[test]
    fn overdue_jobs_are_given_up_and_counted_until_they_end() {
        let sandbox = Sandbox::new(1 << 20, Duration::ZERO);
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(std::sync::Mutex::new(gate));
        let mut ended = Vec::new();
        for _ in 0..MAX_OVERDUE {
            let (gate, (done, end)) = (gate.clone(), mpsc::channel::<()>());
            ended.push(end);
            let job = move || {
                let _done = done;
                gate.lock().unwrap().recv().unwrap();
            };
            assert!(matches!(sandbox.run(job), Err(TextError::TemplateLimit { limit: "time" })));
        }
        assert_eq!(sandbox.overdue.load(Ordering::Acquire), MAX_OVERDUE);
        assert!(matches!(sandbox.run(|| ()), Err(TextError::TemplateLimit { limit: "time" })), "not even started");

        (0..MAX_OVERDUE).for_each(|_| release.send(()).unwrap());
        ended.into_iter().for_each(|end| assert!(end.recv().is_err()));
        while sandbox.overdue.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
        let patient = Sandbox { deadline: Duration::from_secs(60), ..sandbox };
        assert_eq!(patient.run(|| 9).unwrap(), 9);
    }
}
