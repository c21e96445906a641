//! What Hugging Face's templates use of Python.

use std::fmt::Write as _;

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};
use serde_json::Value as Json;

/// Values nested deeper than this are not printed as JSON. Requests cannot have them; only a hostile template can.
const MAX_JSON_DEPTH: usize = 128;

/// Why a template refused a conversation (`raise_exception`).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub String);

pub(super) fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refusal(message)))
}

/// A JSON value as the template sees it.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => Value::from(number),
            (_, Some(number)) => Value::from(number),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(key, field)| (key.as_str(), value(field)))),
    }
}

/// Methods of strings and dictionaries: those of [`minijinja_contrib::pycompat`] and a few more.
pub(super) fn call_method(state: &mut State, object: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = object.as_str() else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, object, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "rsplit" => {
            let (separator, most): (&str, Option<usize>) = from_args(args)?;
            if separator.is_empty() {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let mut parts: Vec<&str> = match most {
                Some(most) => text.rsplitn(most.saturating_add(1), separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, object, method, args),
    }
}

/// The `tojson` filter: Python's `json.dumps` with `ensure_ascii` off and nothing escaped for HTML.
pub(super) fn to_json(
    state: &State,
    value: &Value,
    ensure_ascii: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(indent) if !indent.is_none() => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
        _ => None,
    };
    let separators = kwargs.get::<Option<Value>>("separators")?.filter(|separators| !separators.is_none());
    let (item_separator, key_separator) = match separators {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let text = String::new();
    let mut writer = JsonWriter { state, text, ensure_ascii, indent, item_separator, key_separator, sort_keys };
    writer.write(value, 0)?;
    Ok(writer.text)
}

struct JsonWriter<'a> {
    state: &'a State<'a, 'a>,
    text: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl JsonWriter<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // A small template can print a large value many times; every item is paid for.
        self.state.consume_fuel(1)?;
        if depth > MAX_JSON_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "recursion limit exceeded"));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => write!(self.text, "{value}")?,
            ValueKind::Number => self.text.push_str(&float_repr(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => self.write_list(value, depth)?,
            ValueKind::Map => self.write_map(value, depth)?,
            kind => return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn write_list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.text.push('[');
        let mut is_empty = true;
        for item in list.try_iter()?.checked() {
            self.start_item(is_empty, depth + 1);
            is_empty = false;
            self.write(&item?, depth + 1)?;
        }
        self.end_items(is_empty, depth);
        self.text.push(']');
        Ok(())
    }

    fn write_map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut keys = map.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        if self.sort_keys {
            keys.sort();
        }
        self.text.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.start_item(index == 0, depth + 1);
            match key.as_str() {
                Some(key) => self.write_string(key)?,
                None => {
                    self.text.push('"');
                    self.write(key, depth + 1)?;
                    self.text.push('"');
                }
            }
            self.text.push_str(&self.key_separator);
            self.write(&map.get_item(key)?, depth + 1)?;
        }
        self.end_items(keys.is_empty(), depth);
        self.text.push('}');
        Ok(())
    }

    fn start_item(&mut self, is_first: bool, depth: usize) {
        if !is_first {
            self.text.push_str(&self.item_separator);
        }
        self.break_line(depth);
    }

    fn end_items(&mut self, is_empty: bool, depth: usize) {
        if !is_empty {
            self.break_line(depth);
        }
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            (0..depth).for_each(|_| self.text.push_str(indent));
        }
    }

    fn write_string(&mut self, string: &str) -> Result<(), Error> {
        self.state.consume_fuel(string.len() as u64 / 16)?;
        self.text.push('"');
        for char in string.chars() {
            match char {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                _ if char < ' ' || (self.ensure_ascii && !(' '..='~').contains(&char)) => {
                    for unit in char.encode_utf16(&mut [0; 2]) {
                        write!(self.text, "\\u{unit:04x}")?;
                    }
                }
                _ => self.text.push(char),
            }
        }
        self.text.push('"');
        Ok(())
    }
}

/// A number as Python writes it: the shortest digits, exponents below -4 and from 16 on.
fn float_repr(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => format!("{number:?}"),
        exponent => format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

/// Python's `strftime` in UTC, for the directives that templates use.
pub(super) fn strftime(unix_s: u64, format: &str) -> Result<String, Error> {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_s / 86_400;
    let (year, month, day, day_of_year) = date(days);
    let (hour, minute, second) = (unix_s / 3600 % 24, unix_s / 60 % 60, unix_s % 60);
    let weekday = DAYS[(days as usize + 4) % 7];
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;

    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            text.push(char);
            continue;
        }
        let mut directive = chars.next();
        let is_unpadded = directive == Some('-');
        if is_unpadded {
            directive = chars.next();
        }
        let (number, width) = match directive {
            Some('Y') => (year, 4),
            Some('y') => (year % 100, 2),
            Some('m') => (month, 2),
            Some('d') => (day, 2),
            Some('j') => (day_of_year, 3),
            Some('H') => (hour, 2),
            Some('I') => (hour12, 2),
            Some('M') => (minute, 2),
            Some('S') => (second, 2),
            Some(other) => {
                match other {
                    'A' => text.push_str(weekday),
                    'a' => text.push_str(&weekday[..3]),
                    'B' => text.push_str(month_name),
                    'b' | 'h' => text.push_str(&month_name[..3]),
                    'p' => text.push_str(if hour < 12 { "AM" } else { "PM" }),
                    'e' => write!(text, "{day:>2}")?,
                    'F' => write!(text, "{year:04}-{month:02}-{day:02}")?,
                    'T' => write!(text, "{hour:02}:{minute:02}:{second:02}")?,
                    'Z' | 'z' => {}
                    '%' => text.push('%'),
                    _ => {
                        return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown %{other}")));
                    }
                }
                continue;
            }
            None => return Err(Error::new(ErrorKind::InvalidOperation, "strftime_now: the format ends with %")),
        };
        let width = if is_unpadded { 0 } else { width };
        write!(text, "{number:0width$}")?;
    }
    Ok(text)
}

/// Year, month, day and day of the year, all but the first from 1, of a day counted from 1970.
fn date(days: u64) -> (u64, u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole cycles of 400 years have 146,097 days; the years within one are few enough to count.
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    while rest >= 365 + u64::from(is_leap(year)) {
        rest -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let day_of_year = rest + 1;
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if rest < len {
            break;
        }
        rest -= len;
        month += 1;
    }
    (year, month, rest + 1, day_of_year)
}

#[cfg(test)]
#[path = "python/tests.rs"]
mod tests;
