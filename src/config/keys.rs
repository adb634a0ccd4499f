//! Reading an object of a JSON file key by key: each getter checks type and range, and each error names file, path, value
//! and what should stand there.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::checkpoint::json;
use crate::error::{Error, Result};

/// An object of a JSON file, with what its errors need to say where they are.
#[derive(Clone)]
pub(super) struct Keys<'a> {
    pub(super) file: &'a str,
    /// Path of the object within the file, empty or ending in a dot.
    path: String,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The whole file.
    pub(super) fn new(file: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { file, path: String::new(), map }
    }

    pub(super) fn fault(&self, key: &str, reason: impl AsRef<str>) -> Error {
        Error::file(self.file, format!("{}{}: {}", self.path, json::name(key), reason.as_ref()))
    }

    pub(super) fn wrong(&self, key: &str, found: &Value, should: &str) -> Error {
        self.fault(key, format!("found {}, should be {should}", shown(found)))
    }

    /// A key's value; null counts as absent.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key stands there with null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    pub(super) fn required<T>(&self, key: &str, value: Option<T>, should: &str) -> Result<T> {
        let found = if self.map.contains_key(key) { "is null" } else { "is missing" };
        value.ok_or_else(|| self.fault(key, format!("{found}, should be {should}")))
    }

    pub(super) fn int(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let value = self.optional_int(key, range.clone())?;
        self.required(key, value, &whole(&range))
    }

    pub(super) fn optional_int(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let int = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        int.map(Some).ok_or_else(|| self.wrong(key, value, &whole(&range)))
    }

    pub(super) fn multiple(&self, key: &str, range: RangeInclusive<usize>, of: usize) -> Result<usize> {
        let n = self.optional_multiple(key, range.clone(), of)?;
        self.required(key, n, &whole(&range))
    }

    pub(super) fn optional_multiple(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
        of: usize,
    ) -> Result<Option<usize>> {
        match self.optional_int(key, range)? {
            Some(n) if n % of != 0 => Err(self.fault(key, format!("found {n}, should be a multiple of {of}"))),
            n => Ok(n),
        }
    }

    pub(super) fn float(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let value = self.optional_float(key, range.clone())?;
        self.required(key, value, &number(&range))
    }

    pub(super) fn optional_float(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let float = value.as_f64().filter(|x| range.contains(x));
        float.map(Some).ok_or_else(|| self.wrong(key, value, &number(&range)))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, value, "a string"))
    }

    /// A list of strings.
    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.present(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        list.map(Some).ok_or_else(|| self.wrong(key, value, "a list of strings"))
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(self.below(key, map))),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    /// Every entry of this object, each of which must be an object itself, in the file's order.
    pub(super) fn objects(&self) -> Result<Vec<(&'a str, Keys<'a>)>> {
        let entry = |(key, value): (&'a String, &'a Value)| match value {
            Value::Object(map) => Ok((key.as_str(), self.below(key, map))),
            other => Err(self.wrong(key, other, "an object")),
        };
        self.map.iter().map(entry).collect()
    }

    /// The object `map`, found under `key`.
    pub(super) fn below(&self, key: &str, map: &'a Map<String, Value>) -> Keys<'a> {
        Keys { file: self.file, path: format!("{}{}.", self.path, json::name(key)), map }
    }

    pub(super) fn token(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        Ok(self.optional_int(key, 0..=vocab_size - 1)?.map(|id| id as u32))
    }

    /// One id or a list of them.
    pub(super) fn tokens(&self, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
        let Some(Value::Array(list)) = self.present(key) else {
            return Ok(self.token(key, vocab_size)?.map(|id| vec![id]));
        };
        let id = |value: &Value| {
            let id = value.as_u64().filter(|&id| id < vocab_size as u64);
            let should = || format!("token ids below vocab_size, {vocab_size}");
            id.map(|id| id as u32).ok_or_else(|| self.wrong(key, value, &should()))
        };
        list.iter().map(id).collect::<Result<_>>().map(Some)
    }
}

/// A value as it may stand in a message.
pub(super) fn shown(value: &Value) -> String {
    json::clip(&value.to_string(), 60)
}

pub(super) fn whole(range: &RangeInclusive<usize>) -> String {
    format!("a whole number from {} to {}", range.start(), range.end())
}

pub(super) fn number(range: &RangeInclusive<f64>) -> String {
    format!("a number from {:?} to {:?}", range.start(), range.end())
}
