//! Typed metadata values, their JSON form, and the tokenizer they hold.

use std::collections::BTreeMap;

use serde_json::{Number, Value};

use super::cursor::{Cursor, Fault};

const MAX_KEY_BYTES: usize = 65_535;
/// Elements of all arrays together. A vocabulary of 300,000 tokens with types, scores and merges has about 1.5 million.
const MAX_ARRAY_ELEMENTS: u64 = 8 << 20;
/// Arrays of arrays exist in the format; no known writer nests them at all.
const MAX_ARRAY_DEPTH: usize = 3;

/// The metadata of a GGUF file by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufMetadata(BTreeMap<String, GgufValue>);

/// Integers are widened; their width in the file means nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(GgufArray),
}

#[derive(Clone, Debug, PartialEq)]
pub enum GgufArray {
    Unsigned(Vec<u64>),
    Signed(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<GgufArray>),
}

/// The number of a value's type in the file.
#[derive(Clone, Copy)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [(Kind, usize); 13] = [
        (Kind::U8, 1),
        (Kind::I8, 1),
        (Kind::U16, 2),
        (Kind::I16, 2),
        (Kind::U32, 4),
        (Kind::I32, 4),
        (Kind::F32, 4),
        (Kind::Bool, 1),
        (Kind::String, 8),
        (Kind::Array, 12),
        (Kind::U64, 8),
        (Kind::I64, 8),
        (Kind::F64, 8),
    ];

    /// The type and the fewest bytes that a value of it takes.
    fn read(cursor: &mut Cursor<'_>) -> Result<(Self, usize), Fault> {
        let id = cursor.u32()?;
        Self::ALL.get(id as usize).copied().ok_or_else(|| format!("the metadata type {id} is unknown"))
    }
}

impl GgufMetadata {
    pub(super) fn parse(cursor: &mut Cursor<'_>, entries: u64) -> Result<Self, Fault> {
        let mut metadata = BTreeMap::new();
        let mut parser = Parser { cursor, elements_left: MAX_ARRAY_ELEMENTS };
        for _ in 0..entries {
            let key = parser.cursor.string(MAX_KEY_BYTES, "a metadata key")?;
            let value = parser.value().map_err(|fault| format!("metadata '{key}': {fault}"))?;
            let repeated = format!("metadata '{key}' is given twice");
            if metadata.insert(key, value).is_some() {
                return Err(repeated);
            }
        }
        Ok(Self(metadata))
    }

    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.0.get(key)
    }

    /// All but the arrays of the tokenizer, which are large and no business of a model plugin.
    pub fn to_json(&self) -> BTreeMap<String, Value> {
        let wanted =
            |key: &str, value: &GgufValue| !(key.starts_with("tokenizer.") && matches!(value, GgufValue::Array(_)));
        self.0
            .iter()
            .filter(|(key, value)| wanted(key, value))
            .map(|(key, value)| (key.clone(), value.to_json()))
            .collect()
    }
}

struct Parser<'a, 'b> {
    cursor: &'a mut Cursor<'b>,
    elements_left: u64,
}

impl Parser<'_, '_> {
    fn value(&mut self) -> Result<GgufValue, Fault> {
        let (kind, _) = Kind::read(self.cursor)?;
        Ok(match kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => GgufValue::Unsigned(self.unsigned(kind)?),
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => GgufValue::Signed(self.signed(kind)?),
            Kind::F32 => GgufValue::F32(self.cursor.array().map(f32::from_le_bytes)?),
            Kind::F64 => GgufValue::F64(self.cursor.array().map(f64::from_le_bytes)?),
            Kind::Bool => GgufValue::Bool(self.bool()?),
            Kind::String => GgufValue::String(self.cursor.value_string()?),
            Kind::Array => GgufValue::Array(self.array(1)?),
        })
    }

    fn array(&mut self, depth: usize) -> Result<GgufArray, Fault> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep"));
        }
        let (kind, fewest_bytes) = Kind::read(self.cursor)?;
        let len = self.cursor.count("array elements", self.elements_left)?;
        if len.saturating_mul(fewest_bytes as u64) > self.cursor.remaining() as u64 {
            return Err(format!("an array of {len} elements does not fit into the rest of the file"));
        }
        self.elements_left -= len;
        Ok(match kind {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => {
                GgufArray::Unsigned(self.elements(len, |p| p.unsigned(kind))?)
            }
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => GgufArray::Signed(self.elements(len, |p| p.signed(kind))?),
            Kind::F32 => GgufArray::F32(self.elements(len, |p| p.cursor.array().map(f32::from_le_bytes))?),
            Kind::F64 => GgufArray::F64(self.elements(len, |p| p.cursor.array().map(f64::from_le_bytes))?),
            Kind::Bool => GgufArray::Bool(self.elements(len, Self::bool)?),
            Kind::String => GgufArray::String(self.elements(len, |p| p.cursor.value_string())?),
            Kind::Array => GgufArray::Array(self.elements(len, |p| p.array(depth + 1))?),
        })
    }

    fn elements<T>(&mut self, len: u64, element: impl Fn(&mut Self) -> Result<T, Fault>) -> Result<Vec<T>, Fault> {
        (0..len).map(|i| element(self).map_err(|fault| format!("element {i}: {fault}"))).collect()
    }

    fn unsigned(&mut self, kind: Kind) -> Result<u64, Fault> {
        Ok(match kind {
            Kind::U8 => self.cursor.array().map(u8::from_le_bytes)?.into(),
            Kind::U16 => self.cursor.array().map(u16::from_le_bytes)?.into(),
            Kind::U32 => self.cursor.u32()?.into(),
            _ => self.cursor.u64()?,
        })
    }

    fn signed(&mut self, kind: Kind) -> Result<i64, Fault> {
        Ok(match kind {
            Kind::I8 => self.cursor.array().map(i8::from_le_bytes)?.into(),
            Kind::I16 => self.cursor.array().map(i16::from_le_bytes)?.into(),
            Kind::I32 => self.cursor.array().map(i32::from_le_bytes)?.into(),
            _ => self.cursor.array().map(i64::from_le_bytes)?,
        })
    }

    fn bool(&mut self) -> Result<bool, Fault> {
        match self.cursor.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("{other} is no boolean")),
        }
    }
}

impl GgufValue {
    /// Whatever integer type it has.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Unsigned(value) => (*value).into(),
            Self::Signed(value) => (*value).into(),
            Self::F32(value) => json_f32(value),
            Self::F64(value) => (*value).into(),
            Self::Bool(value) => (*value).into(),
            Self::String(value) => value.as_str().into(),
            Self::Array(array) => array.to_json(),
        }
    }
}

impl GgufArray {
    fn to_json(&self) -> Value {
        match self {
            Self::Unsigned(values) => values.as_slice().into(),
            Self::Signed(values) => values.as_slice().into(),
            Self::F32(values) => values.iter().map(json_f32).collect(),
            Self::F64(values) => values.as_slice().into(),
            Self::Bool(values) => values.as_slice().into(),
            Self::String(values) => values.as_slice().into(),
            Self::Array(values) => values.iter().map(Self::to_json).collect(),
        }
    }
}

/// The shortest number that is this f32 (`1e-5`, not `9.99999974e-6`), as a `config.json` has it. Infinities and NaN,
/// which JSON lacks, become null.
fn json_f32(value: &f32) -> Value {
    let shortest = value.to_string().parse().ok();
    shortest.and_then(Number::from_f64).map_or(Value::Null, Value::Number)
}
