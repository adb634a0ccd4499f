//! The index of a sharded checkpoint: which file holds which tensor. Read as a stream, so that its size bounds memory.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::json::{clip, name as short};
use crate::error::{Error, Result};

/// A `model.safetensors.index.json`. Its metadata is not read.
#[derive(serde::Deserialize)]
pub(super) struct Index {
    weight_map: WeightMap,
}

/// Tensor name → position in `shards`.
struct WeightMap {
    shards: Vec<String>,
    tensors: BTreeMap<String, usize>,
}

impl Index {
    /// Reads and checks the bytes of an index, called `file` in messages.
    pub(super) fn from_json(file: &str, bytes: &[u8]) -> Result<Self> {
        let index: Self = serde_json::from_slice(bytes)
            .map_err(|e| Error::file(file, format!("is not a valid index: {}", clip(&e.to_string(), 240))))?;
        if index.weight_map.tensors.is_empty() {
            return Err(Error::file(file, "weight_map is empty"));
        }
        Ok(index)
    }

    /// The files, each a checked plain name, in the order in which the index first names them.
    pub(super) fn shards(&self) -> &[String] {
        &self.weight_map.shards
    }

    /// Tensors and the positions of their files, in the order of their names.
    pub(super) fn tensors(&self) -> &BTreeMap<String, usize> {
        &self.weight_map.tensors
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("weight_map as an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut positions = BTreeMap::new();
                let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
                while let Some(tensor) = map.next_key::<String>()? {
                    let fault = |e: A::Error| A::Error::custom(format_args!("weight_map.{}: {e}", short(&tensor)));
                    let shard = map.next_value::<String>().map_err(fault)?;
                    let idx = match positions.get(&shard) {
                        Some(&idx) => idx,
                        None => {
                            check_shard_name(&shard).map_err(|why| {
                                A::Error::custom(format_args!("the shard name {:?} {why}", short(&shard)))
                            })?;
                            shards.push(shard.clone());
                            positions.insert(shard, shards.len() - 1);
                            shards.len() - 1
                        }
                    };
                    let twice = format_args!("weight_map names {} twice", short(&tensor)).to_string();
                    if tensors.insert(tensor, idx).is_some() {
                        return Err(A::Error::custom(twice));
                    }
                }
                Ok(WeightMap { shards, tensors })
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// A shard must be a plain file beside the index, on every system. The error ends a sentence.
fn check_shard_name(name: &str) -> Result<(), &'static str> {
    if !name.ends_with(".safetensors") {
        return Err("does not end in .safetensors");
    }
    if name.len() > 255 || name.starts_with('.') || name.contains("..") {
        return Err("is not a plain file name");
    }
    if name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control()) {
        return Err("is not a plain file name: the shards must lie beside the index");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_tensors_and_shards() {
        let text = br#"{"metadata": {"total_size": 7, "x": [1]}, "weight_map": {"b": "2.safetensors",
            "a": "1.safetensors", "c": "2.safetensors"}}"#;
        let index = Index::from_json("i", text).unwrap();
        assert_eq!(index.shards(), ["2.safetensors", "1.safetensors"]);
        let tensors: Vec<_> = index.tensors().iter().map(|(name, &idx)| (name.as_str(), idx)).collect();
        assert_eq!(tensors, [("a", 1), ("b", 0), ("c", 0)]);
        for (text, words) in [
            (r#"{"weight_map": {}}"#, "weight_map is empty"),
            (r#"{}"#, "missing field `weight_map`"),
            (r#"{"weight_map": {"a": 1}}"#, "weight_map.a: invalid type"),
            (r#"{"weight_map": {"a": "1.safetensors", "a": "1.safetensors"}}"#, "names a twice"),
            (r#"{"weight_map": {"a": "1.safetensors"}, "weight_map": {"a": "1.safetensors"}}"#, "duplicate field"),
        ] {
            let error = Index::from_json("i", text.as_bytes()).err().expect(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn shard_names_are_plain_file_names() {
        check_shard_name("model-00000-of-00001.safetensors").unwrap();
        for bad in [
            "../a.safetensors",
            "/a.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:a.safetensors",
            "a\0.safetensors",
            ".safetensors",
            "a.bin",
            "",
            "..",
        ] {
            assert!(check_shard_name(bad).is_err(), "{bad:?}");
        }
    }
}
