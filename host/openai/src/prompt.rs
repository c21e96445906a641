//! What is to be continued: text or token ids, one prompt or several.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Unexpected, Visitor},
};

use crate::{OneOrMany, limits::MAX_LIST, scalar::read_list};

/// `prompt` of `/v1/completions`.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(OneOrMany<String>),
    Tokens(TokenPrompt),
}

/// `input_ids` of `/generate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenPrompt {
    One(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

impl TokenPrompt {
    pub fn as_slice(&self) -> &[Vec<u32>] {
        match self {
            Self::One(ids) => std::slice::from_ref(ids),
            Self::Many(prompts) => prompts,
        }
    }
}

/// The first element of a list tells what the others must be.
enum First {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FirstVisitor;

        impl<'de> Visitor<'de> for FirstVisitor {
            type Value = First;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a text, a token id or a list of token ids")
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<First, E> {
                Ok(First::Text(value.to_owned()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<First, E> {
                token_id(value).map(First::Id)
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<First, E> {
                Err(E::invalid_value(Unexpected::Signed(value), &TOKEN_ID))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<First, A::Error> {
                read_ids(Vec::new(), seq).map(First::Ids)
            }
        }

        deserializer.deserialize_any(FirstVisitor)
    }
}

const TOKEN_ID: &str = "a token id (an integer of at least 0)";

fn token_id<E: Error>(value: u64) -> Result<u32, E> {
    u32::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &TOKEN_ID))
}

struct TokenId(u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokenIdVisitor;

        impl Visitor<'_> for TokenIdVisitor {
            type Value = TokenId;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str(TOKEN_ID)
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<TokenId, E> {
                token_id(value).map(TokenId)
            }
        }

        deserializer.deserialize_u32(TokenIdVisitor)
    }
}

struct TokenIds(Vec<u32>);

impl<'de> Deserialize<'de> for TokenIds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokenIdsVisitor;

        impl<'de> Visitor<'de> for TokenIdsVisitor {
            type Value = TokenIds;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list of token ids")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<TokenIds, A::Error> {
                read_ids(Vec::new(), seq).map(TokenIds)
            }
        }

        deserializer.deserialize_seq(TokenIdsVisitor)
    }
}

fn read_ids<'de, A: SeqAccess<'de>>(mut ids: Vec<u32>, mut seq: A) -> Result<Vec<u32>, A::Error> {
    while let Some(TokenId(id)) = seq.next_element()? {
        ids.push(id);
    }
    Ok(ids)
}

fn read_prompts<'de, A: SeqAccess<'de>>(first: Vec<u32>, mut seq: A) -> Result<Vec<Vec<u32>>, A::Error> {
    let mut prompts = vec![first];
    while let Some(TokenIds(ids)) = seq.next_element()? {
        if prompts.len() == MAX_LIST {
            return Err(A::Error::custom(format_args!("at most {MAX_LIST} prompts are allowed")));
        }
        prompts.push(ids);
    }
    Ok(prompts)
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;

        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a text, a list of texts, a list of token ids or a list of lists of token ids")
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(OneOrMany::One(value.to_owned())))
            }

            fn visit_string<E: Error>(self, value: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(OneOrMany::One(value)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                Ok(match seq.next_element()? {
                    None => Prompt::Tokens(TokenPrompt::One(Vec::new())),
                    Some(First::Text(text)) => Prompt::Text(OneOrMany::Many(read_list(vec![text], seq)?)),
                    Some(First::Id(id)) => Prompt::Tokens(TokenPrompt::One(read_ids(vec![id], seq)?)),
                    Some(First::Ids(ids)) => Prompt::Tokens(TokenPrompt::Many(read_prompts(ids, seq)?)),
                })
            }
        }

        deserializer.deserialize_any(PromptVisitor)
    }
}

impl<'de> Deserialize<'de> for TokenPrompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokenPromptVisitor;

        impl<'de> Visitor<'de> for TokenPromptVisitor {
            type Value = TokenPrompt;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list of token ids or a list of lists of token ids")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TokenPrompt, A::Error> {
                Ok(match seq.next_element()? {
                    None => TokenPrompt::One(Vec::new()),
                    Some(First::Id(id)) => TokenPrompt::One(read_ids(vec![id], seq)?),
                    Some(First::Ids(ids)) => TokenPrompt::Many(read_prompts(ids, seq)?),
                    Some(First::Text(text)) => {
                        return Err(A::Error::invalid_type(Unexpected::Str(&text), &TOKEN_ID));
                    }
                })
            }
        }

        deserializer.deserialize_seq(TokenPromptVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::from_str;

    use super::*;

    #[test]
    fn the_first_element_decides() {
        let text = |text: &str| text.to_owned();
        let cases = [
            ("\"a\"", Prompt::Text(OneOrMany::One(text("a")))),
            ("[\"a\",\"b\"]", Prompt::Text(OneOrMany::Many(vec![text("a"), text("b")]))),
            ("[1,2]", Prompt::Tokens(TokenPrompt::One(vec![1, 2]))),
            ("[[1],[2,3],[]]", Prompt::Tokens(TokenPrompt::Many(vec![vec![1], vec![2, 3], vec![]]))),
            ("[]", Prompt::Tokens(TokenPrompt::One(vec![]))),
        ];
        for (json, prompt) in cases {
            assert_eq!(from_str::<Prompt>(json).unwrap(), prompt, "{json}");
        }
        for json in ["[1,\"a\"]", "[\"a\",1]", "[[1],2]", "[-1]", "[1,-1]", "[4294967296]", "[1.5]", "{}", "5", "null"]
        {
            assert!(from_str::<Prompt>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn token_prompts_take_no_text() {
        assert_eq!(from_str::<TokenPrompt>("[[1],[2]]").unwrap().as_slice().len(), 2);
        assert_eq!(from_str::<TokenPrompt>("[4294967295]").unwrap(), TokenPrompt::One(vec![u32::MAX]));
        for json in ["\"a\"", "[\"a\"]", "[[\"a\"]]"] {
            assert!(from_str::<TokenPrompt>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn the_number_of_prompts_is_limited_while_reading() {
        let prompts = format!("[{}[]]", "[],".repeat(MAX_LIST));
        assert!(from_str::<Prompt>(&prompts).unwrap_err().to_string().contains("at most 1024 prompts"));
        let texts = format!("[{}\"\"]", "\"\",".repeat(MAX_LIST));
        assert!(from_str::<Prompt>(&texts).is_err());
    }
}
