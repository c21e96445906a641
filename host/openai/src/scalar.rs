//! Values of single fields.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{self, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor, value},
};

use crate::limits::{MAX_LIST, MAX_LOGIT_BIAS};

/// An integer. `16.0` is one too, as some languages do not tell the two apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Int(pub i64);

/// Beyond this, not every integer has a floating-point number of its own.
const MAX_EXACT_FLOAT: f64 = 9_007_199_254_740_992.0;

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntVisitor;

        impl Visitor<'_> for IntVisitor {
            type Value = Int;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an integer of 64 bits")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Int, E> {
                Ok(Int(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Int, E> {
                i64::try_from(value).map(Int).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Int, E> {
                if value.fract() == 0.0 && value.abs() <= MAX_EXACT_FLOAT {
                    Ok(Int(value as i64))
                } else {
                    Err(E::invalid_value(Unexpected::Float(value), &self))
                }
            }
        }

        deserializer.deserialize_any(IntVisitor)
    }
}

/// A finite number.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Number(pub f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberVisitor;

        impl Visitor<'_> for NumberVisitor {
            type Value = Number;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a number")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Number, E> {
                if value.is_finite() {
                    Ok(Number(value))
                } else {
                    Err(E::invalid_value(Unexpected::Float(value), &"a finite number"))
                }
            }
        }

        deserializer.deserialize_any(NumberVisitor)
    }
}

/// One value for all prompts of a request, or one for each. A list has at most [`MAX_LIST`] elements.
#[derive(Clone, Debug, PartialEq)]
pub enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }

    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }

    /// The value for the prompt at `index`.
    pub fn get(&self, index: usize) -> Option<&T> {
        match self {
            Self::One(value) => Some(value),
            Self::Many(values) => values.get(index),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a value or a list of values")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
                T::deserialize(value::BoolDeserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
                T::deserialize(value::I64Deserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
                T::deserialize(value::U64Deserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
                T::deserialize(value::F64Deserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
                T::deserialize(value::StrDeserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_string<E: Error>(self, value: String) -> Result<Self::Value, E> {
                T::deserialize(value::StringDeserializer::new(value)).map(OneOrMany::One)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(value::MapAccessDeserializer::new(map)).map(OneOrMany::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                read_list(Vec::new(), seq).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

/// The rest of a list of at most [`MAX_LIST`] elements.
pub(crate) fn read_list<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut list: Vec<T>,
    mut seq: A,
) -> Result<Vec<T>, A::Error> {
    while let Some(element) = seq.next_element()? {
        if list.len() == MAX_LIST {
            return Err(A::Error::custom(format_args!("a list may have at most {MAX_LIST} elements")));
        }
        list.push(element);
    }
    Ok(list)
}

/// `logit_bias`: token ids, which JSON writes as strings, and what is added to their logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias(pub Vec<(i64, f64)>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LogitBiasVisitor;

        impl<'de> Visitor<'de> for LogitBiasVisitor {
            type Value = LogitBias;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object of token ids and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let id = key.parse().map_err(|_| {
                        de::Error::invalid_value(Unexpected::Str(&key), &"a token id as the key of logit_bias")
                    })?;
                    if entries.len() == MAX_LOGIT_BIAS {
                        return Err(de::Error::custom(format_args!("at most {MAX_LOGIT_BIAS} entries are allowed")));
                    }
                    entries.push((id, map.next_value::<Number>()?.0));
                }
                Ok(LogitBias(entries))
            }
        }

        deserializer.deserialize_map(LogitBiasVisitor)
    }
}

/// A hint that cannot change an answer, whatever it says.
pub type Ignored = IgnoredAny;

/// A field of a feature that does not exist here. `null`, `false` and what is empty do not ask for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsupported {
    pub is_wanted: bool,
}

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WantedVisitor;

        impl<'de> Visitor<'de> for WantedVisitor {
            type Value = bool;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("anything")
            }

            fn visit_unit<E: Error>(self) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<bool, E> {
                Ok(value)
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<bool, E> {
                Ok(!value.is_empty())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
                let mut is_wanted = false;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    is_wanted = true;
                }
                Ok(is_wanted)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
                let mut is_wanted = false;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    is_wanted = true;
                }
                Ok(is_wanted)
            }
        }

        deserializer.deserialize_any(WantedVisitor).map(|is_wanted| Self { is_wanted })
    }
}

/// Tells a field that is `null` (`Some(None)`) from one that is absent (`None`).
pub(crate) fn nullable<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::from_str;

    use super::*;

    #[test]
    fn integers_are_exact_or_refused() {
        let cases = [
            ("16", Some(16)),
            ("16.0", Some(16)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("1e300", None),
            ("1e999", None),
            ("0.5", None),
            ("\"16\"", None),
            ("true", None),
            ("null", None),
        ];
        for (text, value) in cases {
            assert_eq!(from_str::<Int>(text).ok(), value.map(Int), "{text}");
        }
    }

    #[test]
    fn numbers_are_finite() {
        assert_eq!(from_str::<Number>("3").ok(), Some(Number(3.0)));
        assert_eq!(from_str::<Number>("-2.5e-3").ok(), Some(Number(-0.0025)));
        for text in ["1e999", "-1e999", "NaN", "Infinity", "\"1\"", "[]"] {
            assert!(from_str::<Number>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_or_many_of_scalars_and_objects() {
        assert_eq!(from_str::<OneOrMany<String>>("\"a\"").unwrap(), OneOrMany::One("a".to_owned()));
        assert_eq!(from_str::<OneOrMany<bool>>("[true,false]").unwrap(), OneOrMany::Many(vec![true, false]));
        assert_eq!(from_str::<OneOrMany<Int>>("-1").unwrap().get(7), Some(&Int(-1)));
        assert_eq!(from_str::<OneOrMany<Int>>("[1,2]").unwrap().get(7), None);
        let list = format!("[{}1]", "1,".repeat(MAX_LIST));
        assert!(from_str::<OneOrMany<Int>>(&list).unwrap_err().to_string().contains("at most 1024 elements"));
    }

    #[test]
    fn logit_bias_has_integer_keys_and_a_limit() {
        let bias: LogitBias = from_str(r#"{"15": 1, "-3": -0.5}"#).unwrap();
        assert_eq!(bias.0, [(15, 1.0), (-3, -0.5)]);
        assert!(from_str::<LogitBias>(r#"{"a": 1}"#).unwrap_err().to_string().contains("token id"));
        assert!(from_str::<LogitBias>(r#"{"1": "x"}"#).is_err());
        let entries: Vec<String> = (0..=MAX_LOGIT_BIAS).map(|id| format!("\"{id}\":0")).collect();
        assert!(from_str::<LogitBias>(&format!("{{{}}}", entries.join(","))).is_err());
    }

    #[test]
    fn unsupported_fields_know_whether_they_were_asked_for() {
        for text in ["null", "false", "\"\"", "[]", "{}"] {
            assert!(!from_str::<Unsupported>(text).unwrap().is_wanted, "{text}");
        }
        for text in ["true", "0", "-1", "0.0", "\"x\"", "[null]", "{\"a\":[[{}]]}"] {
            assert!(from_str::<Unsupported>(text).unwrap().is_wanted, "{text}");
        }
    }
}
