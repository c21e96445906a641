//! Named values: how PJRT passes options in, and attributes and properties out.

use std::{collections::BTreeMap, mem::size_of, ptr};

use pjrt_sys::{PJRT_NamedValue, PJRT_NamedValue__bindgen_ty_1 as RawValue};

use crate::args::{copy_text, lent_slice};

/// The value of an option that is passed in, or of an attribute or a property that comes out.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    Text(String),
    Int(i64),
    Ints(Vec<i64>),
    Float(f32),
    Bool(bool),
}

impl OptionValue {
    /// The number, if it is one.
    pub fn as_int(&self) -> Option<i64> {
        if let Self::Int(value) = self { Some(*value) } else { None }
    }

    /// The number, if it is one; integers are converted.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(f64::from(*value)),
            Self::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(value) = self { Some(value) } else { None }
    }

    /// Borrows both name and value: the result is valid as long as they are.
    fn as_raw(&self, name: &str) -> PJRT_NamedValue {
        let (kind, value, value_size) = match self {
            Self::Text(text) => (
                pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kString,
                RawValue { string_value: text.as_ptr().cast() },
                text.len(),
            ),
            Self::Int(value) => {
                (pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kInt64, RawValue { int64_value: *value }, 1)
            }
            Self::Ints(values) => (
                pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kInt64List,
                RawValue { int64_array_value: values.as_ptr() },
                values.len(),
            ),
            Self::Float(value) => {
                (pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kFloat, RawValue { float_value: *value }, 1)
            }
            Self::Bool(value) => {
                (pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kBool, RawValue { bool_value: *value }, 1)
            }
        };
        // Never padded: plugins index lists of these by their own size of the struct.
        PJRT_NamedValue {
            struct_size: size_of::<PJRT_NamedValue>(),
            extension_start: ptr::null_mut(),
            name: name.as_ptr().cast(),
            name_size: name.len(),
            type_: kind,
            __bindgen_anon_1: value,
            value_size,
        }
    }
}

impl From<&str> for OptionValue {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<i64> for OptionValue {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<f32> for OptionValue {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl From<bool> for OptionValue {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<Vec<i64>> for OptionValue {
    fn from(value: Vec<i64>) -> Self {
        Self::Ints(value)
    }
}

/// Borrows the values: the result is valid as long as they are unchanged.
pub(crate) fn raw_values(values: &[(String, OptionValue)]) -> Vec<PJRT_NamedValue> {
    values.iter().map(|(name, value)| value.as_raw(name)).collect()
}

/// Copies a list that a plugin lent us. A value of a kind unknown to us is left out.
///
/// # Safety
/// `values` is null or points to `len` named values, each pointing to what it says.
pub(crate) unsafe fn copy_values(values: *const PJRT_NamedValue, len: usize) -> BTreeMap<String, OptionValue> {
    // SAFETY: promised by the caller.
    let values = unsafe { lent_slice(values, len) };
    // SAFETY: promised by the caller.
    let copy = |value: &PJRT_NamedValue| unsafe { Some((copy_text(value.name, value.name_size), copy_value(value)?)) };
    values.iter().filter_map(copy).collect()
}

/// # Safety
/// The value points to what its kind and size say.
unsafe fn copy_value(value: &PJRT_NamedValue) -> Option<OptionValue> {
    let content = &value.__bindgen_anon_1;
    // SAFETY: the kind says which field of the union was written; the caller vouches for the pointers.
    unsafe {
        match value.type_ {
            pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kString => {
                Some(OptionValue::Text(copy_text(content.string_value, value.value_size)))
            }
            pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kInt64 => Some(OptionValue::Int(content.int64_value)),
            pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kInt64List => {
                Some(OptionValue::Ints(lent_slice(content.int64_array_value, value.value_size).to_vec()))
            }
            pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kFloat => Some(OptionValue::Float(content.float_value)),
            pjrt_sys::PJRT_NamedValue_Type_PJRT_NamedValue_kBool => Some(OptionValue::Bool(content.bool_value)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_to_c_and_back() {
        let values = [
            ("text".to_owned(), OptionValue::from("v6e:2x2")),
            ("empty".to_owned(), OptionValue::from("")),
            ("count".to_owned(), OptionValue::from(-4)),
            ("list".to_owned(), OptionValue::from(vec![1, 2, 3])),
            ("fraction".to_owned(), OptionValue::from(0.75_f32)),
            ("flag".to_owned(), OptionValue::from(true)),
        ];
        let raw = raw_values(&values);
        // SAFETY: `raw` borrows `values`, which is alive.
        let copied = unsafe { copy_values(raw.as_ptr(), raw.len()) };
        assert_eq!(copied, BTreeMap::from(values));
    }

    #[test]
    fn values_of_unknown_kinds_are_left_out() {
        let value = OptionValue::from(1);
        let mut raw = value.as_raw("newer");
        raw.type_ = 99;
        // SAFETY: one value, alive.
        assert!(unsafe { copy_values(&raw, 1) }.is_empty());
    }
}
