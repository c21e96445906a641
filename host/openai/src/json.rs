//! Free-form JSON of bounded size.

use std::{cell::Cell, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

use crate::limits::MAX_JSON_VALUES;

/// Any JSON of at most [`MAX_JSON_VALUES`] values. (Depth is limited by `serde_json`, to 128.)
///
/// A value takes many times more memory than the two bytes that a client may spend on it.
#[derive(Clone, Debug, PartialEq)]
pub struct BoundedJson(pub Value);

impl<'de> Deserialize<'de> for BoundedJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Counted { remaining: &Cell::new(MAX_JSON_VALUES) }.deserialize(deserializer).map(Self)
    }
}

/// Reads one value and what is in it.
#[derive(Clone, Copy)]
struct Counted<'a> {
    remaining: &'a Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let remaining = self.remaining.get().checked_sub(1);
        self.remaining
            .set(remaining.ok_or_else(|| D::Error::custom(format_args!("more than {MAX_JSON_VALUES} values")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            values.insert(key, map.next_value_seed(self)?);
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, json};

    use super::*;

    #[test]
    fn small_json_is_read_as_it_is() {
        let text = r#"{"a":[1,-2,0.5,null,true,"x"],"b":{"c":{}}}"#;
        let json = json!({"a": [1, -2, 0.5, null, true, "x"], "b": {"c": {}}});
        assert_eq!(from_str::<BoundedJson>(text).unwrap().0, json);
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let wide = format!("[{}0]", "0,".repeat(MAX_JSON_VALUES));
        assert!(from_str::<BoundedJson>(&wide).unwrap_err().to_string().contains("more than 100000 values"));
        let deep = "[".repeat(1_000_000);
        assert!(from_str::<BoundedJson>(&deep).unwrap_err().to_string().contains("recursion limit"));
    }
}
