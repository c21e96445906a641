//! Names of plugins.

/// The name of a new plugin in its spellings: `my-kernel` (package), `my_kernel` (library and plugin), `MyKernel`
/// (type).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    pub package: String,
    pub plugin: String,
    pub type_name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("'{0}' cannot be the name of a plugin: use lower-case letters, digits and '-', and begin with a letter")]
    Characters(String),
    #[error("'{0}' cannot be the name of a plugin: it is a word of the Rust language or its standard library")]
    Reserved(String),
    #[error("'{0}' cannot be the name of a plugin: the plugin is built with a crate of that name")]
    Crate(String),
    #[error(
        "'{name}' cannot be the name of a plugin: its type would be {type_name}, which the code uses already; try my-{name}"
    )]
    Type { name: String, type_name: String },
}

/// Words that cannot name a crate.
const RESERVED: &str = "abstract alloc as async await become box break const continue core crate do dyn else enum \
    extern false final fn for gen if impl in let loop macro match mod move mut override priv proc-macro proc_macro pub \
    ref return self static std struct super test trait true try type typeof unsafe unsized use virtual where while \
    yield";

impl Name {
    pub fn new(name: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(allowed) {
            return Err(NameError::Characters(name.to_owned()));
        }
        if RESERVED.split_whitespace().any(|word| word == name) {
            return Err(NameError::Reserved(name.to_owned()));
        }
        let capitalized = |word: &str| word[..1].to_ascii_uppercase() + &word[1..];
        let words = name.split(['-', '_']).filter(|word| !word.is_empty());
        let type_name = words.map(capitalized).collect();
        Ok(Self { package: name.to_owned(), plugin: name.replace('-', "_"), type_name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_follow_from_the_package() {
        let name = Name::new("my-2nd-kernel").unwrap();
        assert_eq!((name.plugin.as_str(), name.type_name.as_str()), ("my_2nd_kernel", "My2ndKernel"));
        assert_eq!(Name::new("a_b-").unwrap().type_name, "AB");
    }

    #[test]
    fn what_cargo_would_refuse_is_refused() {
        for name in ["", "9to5", "-a", "My", "a/b", "ä", "a b", "../a"] {
            assert_eq!(Name::new(name), Err(NameError::Characters(name.to_owned())));
        }
        for name in ["match", "std", "proc-macro"] {
            assert_eq!(Name::new(name), Err(NameError::Reserved(name.to_owned())));
        }
    }
}
