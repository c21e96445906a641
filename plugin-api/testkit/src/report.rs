//! What was looked at, and what came of it.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Passed,
    Failed,
    /// The plugin says that it does not serve this.
    Declined,
    /// It was not looked at, for the reason given.
    Skipped,
}

#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub check: String,
    pub outcome: Outcome,
    pub detail: String,
    /// What was measured, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub measured: BTreeMap<&'static str, f64>,
}

/// The findings of a check, in the order they were made.
#[must_use = "a report says whether the plugin conforms: call `assert`"]
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Report {
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn add(&mut self, check: impl Into<String>, outcome: Outcome, detail: impl ToString) {
        self.add_measured(check, outcome, detail, BTreeMap::new());
    }

    pub fn add_measured(
        &mut self,
        check: impl Into<String>,
        outcome: Outcome,
        detail: impl ToString,
        measured: BTreeMap<&'static str, f64>,
    ) {
        self.findings.push(Finding { check: check.into(), outcome, detail: detail.to_string(), measured });
    }

    pub fn passed(&mut self, check: impl Into<String>, detail: impl ToString) {
        self.add(check, Outcome::Passed, detail);
    }

    pub fn failed(&mut self, check: impl Into<String>, detail: impl ToString) {
        self.add(check, Outcome::Failed, detail);
    }

    /// Passed with what `result` says, or failed with why not.
    pub fn result(&mut self, check: impl Into<String>, result: Result<String, String>) {
        match result {
            Ok(detail) => self.passed(check, detail),
            Err(reason) => self.failed(check, reason),
        }
    }

    pub fn extend(&mut self, other: Report) {
        self.findings.extend(other.findings);
    }

    /// Nothing failed, and something passed.
    pub fn conforms(&self) -> bool {
        let has = |outcome| self.findings.iter().any(|finding| finding.outcome == outcome);
        has(Outcome::Passed) && !has(Outcome::Failed)
    }

    /// # Panics
    /// With the whole report, if the plugin does not conform.
    #[track_caller]
    pub fn assert(&self) {
        assert!(self.conforms(), "the plugin does not conform:\n{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { check, outcome, detail, .. } in &self.findings {
            let mark = match outcome {
                Outcome::Passed => "ok  ",
                Outcome::Failed => "FAIL",
                Outcome::Declined => "no  ",
                Outcome::Skipped => "skip",
            };
            writeln!(f, "{mark} {check}: {detail}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_conforms_if_something_passed_and_nothing_failed() {
        let mut report = Report::default();
        report.add("a", Outcome::Declined, "no windows");
        assert!(!report.conforms());
        report.passed("b", "fine");
        assert!(report.conforms());
        report.failed("c", "off by one");
        assert!(!report.conforms());
        assert_eq!(report.to_string(), "no   a: no windows\nok   b: fine\nFAIL c: off by one\n");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json[2], serde_json::json!({"check": "c", "outcome": "failed", "detail": "off by one"}));
    }
}
