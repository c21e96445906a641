//! Model families: what an opened checkpoint says of itself and emits, and whether its numbers are the same however a
//! prompt is computed.
//!
//! [`run`] knows no right logits: it compares a model with itself. Logits of one prompt may differ by 1e-3 of the largest
//! between a prefill, chunks, single tokens, more padding, and company in the batch, all in `f32` with random weights.

mod assemble;
mod describe;
mod emit;
mod run;

pub use assemble::{Program, hidden_program};
pub use run::run;
use torus_abi::{
    author::Model,
    fault::FaultCode,
    fragment::Package,
    model::{EmitModel, ModelDescription, ModelOptions},
};

use crate::Report;

/// An opened model. Errors are in the plugin's own words.
pub trait Opened {
    fn describe(&self) -> Result<ModelDescription, String>;
    fn emit(&self, request: &EmitModel) -> Result<Package, String>;
}

struct InProcess<M>(M);

impl<M: Model> Opened for InProcess<M> {
    fn describe(&self) -> Result<ModelDescription, String> {
        Ok(self.0.describe())
    }

    fn emit(&self, request: &EmitModel) -> Result<Package, String> {
        self.0.emit(request).map_err(|fault| fault.to_string())
    }
}

/// Checks a model family with the text of a `config.json`; a small one will do. The numbers are `torus plugins check`'s.
pub fn check<M: Model>(config: &str) -> Report {
    let mut report = Report::default();
    let config: serde_json::Value = match serde_json::from_str(config) {
        Ok(config) => config,
        Err(error) => {
            report.failed("config", format_args!("it is no JSON: {error}"));
            return report;
        }
    };
    for architecture in M::ARCHITECTURES {
        let name = format!("open of a config with nothing but '{architecture}'");
        let config = serde_json::json!({"architectures": [architecture]});
        report.result(
            name,
            match M::open(&ModelOptions { config, parallel: Default::default() }) {
                Err(fault) if fault.code != FaultCode::Internal && !fault.message.is_empty() => {
                    Ok(format!("refused: {fault}"))
                }
                Err(fault) => Err(format!("it is refused as {:?}: '{fault}'", fault.code)),
                Ok(_) => Err("it is accepted, though sizes are missing".to_owned()),
            },
        );
    }
    let options = ModelOptions { config, parallel: Default::default() };
    let open = || -> Result<Box<dyn Opened>, String> {
        let model = M::open(&options).map_err(|fault| fault.to_string())?;
        Ok(Box::new(InProcess(model)))
    };
    report.extend(check_opened(&open));
    report
}

/// Checks a model that is opened twice: both must answer alike.
pub fn check_opened(open: &dyn Fn() -> Result<Box<dyn Opened>, String>) -> Report {
    let mut report = Report::default();
    let opened = open().and_then(|first| Ok([first, open()?]));
    let [first, second] = match opened {
        Ok(opened) => opened,
        Err(error) => {
            report.failed("open", error);
            return report;
        }
    };
    match (first.describe(), second.describe()) {
        (Ok(description), Ok(again)) if description == again => {
            describe::check(&description, &mut report);
            emit::check([&*first, &*second], &description, &mut report);
        }
        (Ok(_), Ok(_)) => report.failed("describe", "opened twice, the same config is described differently"),
        (Err(error), _) | (_, Err(error)) => report.failed("describe", error),
    }
    report
}
