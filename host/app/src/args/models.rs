//! `--model`: which models, under which names, with how much memory.

use std::path::Path;

use super::{engine::ModelArgs, values::fraction};

/// A model of the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `None` = as the path says.
    pub name: Option<String>,
    pub path: String,
    /// Share of the memory.
    pub mem: Option<f64>,
}

impl ModelSpec {
    fn of_path(path: &str) -> Self {
        Self { name: None, path: path.to_owned(), mem: None }
    }
}

/// `[NAME=]PATH[,mem=SHARE]`. What exists as it stands is a path.
pub fn model_spec(text: &str) -> Result<ModelSpec, String> {
    if Path::new(text).exists() {
        return Ok(ModelSpec::of_path(text));
    }
    let (rest, mem) = match text.rsplit_once(",mem=") {
        Some((rest, share)) => (rest, Some(fraction(share).map_err(|error| format!("mem {error}"))?)),
        None => (text, None),
    };
    let (name, path) = match rest.split_once('=') {
        Some((name, path)) if !name.contains('/') => (Some(name), path),
        _ => (None, rest),
    };
    if path.is_empty() || name == Some("") {
        return Err("must be [NAME=]PATH[,mem=SHARE]".to_owned());
    }
    Ok(ModelSpec { name: name.map(str::to_owned), path: path.to_owned(), mem })
}

impl ModelArgs {
    /// The models to serve, each with its share of the memory: `None` for a single one, which takes what it needs.
    ///
    /// # Errors
    /// If shares add up to more than there is.
    pub fn specs(&self) -> Result<Vec<ModelSpec>, String> {
        let mut specs: Vec<_> = self.model_path.iter().map(|path| ModelSpec::of_path(path)).collect();
        specs.extend(self.models.iter().cloned());
        if specs.len() < 2 {
            return Ok(specs);
        }
        let given: f64 = specs.iter().filter_map(|spec| spec.mem).sum();
        let without = specs.iter().filter(|spec| spec.mem.is_none()).count();
        // Shares are written in decimals, whose sum may miss 1 by a hair.
        if given > 1.0 + 1e-9 || (without > 0 && given >= 1.0 - 1e-9) {
            return Err(format!(
                "--model: the shares given with mem add up to {given}, which leaves nothing for others"
            ));
        }
        let equal = (1.0 - given) / without.max(1) as f64;
        specs.iter_mut().for_each(|spec| spec.mem = spec.mem.or(Some(equal)));
        Ok(specs)
    }

    /// The path of the only model.
    pub fn only(&self) -> Result<String, String> {
        match self.specs()?.as_slice() {
            [spec] => Ok(spec.path.clone()),
            _ => Err("--model: one model is needed here, no more".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_paths_and_shares_are_told_apart() {
        let spec =
            |name: Option<&str>, path: &str, mem| ModelSpec { name: name.map(str::to_owned), path: path.into(), mem };
        for (text, expected) in [
            ("org/model", spec(None, "org/model", None)),
            ("small=org/model", spec(Some("small"), "org/model", None)),
            ("small=/a/b.gguf,mem=0.25", spec(Some("small"), "/a/b.gguf", Some(0.25))),
            ("/a=b/c", spec(None, "/a=b/c", None)),
        ] {
            assert_eq!(model_spec(text).unwrap(), expected, "{text}");
        }
        for text in ["=x", "x=", "", "a=b,mem=2", "a=b,mem="] {
            assert!(model_spec(text).is_err(), "{text}");
        }
    }
}
