//! What a checkpoint declares about the formats of its weights: by whom it was quantised, and for each module how.
//!
//! The words of the producers are read in `producers.rs`. A tensor's own dtype has the last word on its format
//! ([`Checkpoint::stored`](crate::checkpoint::Checkpoint::stored)); what only the declaration can say is whether scales
//! of activations belong to the file.

use super::Family;
use super::keys::Keys;
use super::patterns::{Names, Reach};
use super::producers;
use crate::checkpoint::json;
use crate::error::{Error, Result};

/// Who wrote the quantised weights, and so how tensors are called and what their scales mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Producer {
    /// Nobody: plain weights.
    None,
    /// OpenAI's gpt-oss files: `quant_method: mxfp4`.
    OpenAi,
    /// NVIDIA ModelOpt, and Fourfold's own quantiser, which follows it.
    ModelOpt,
    /// compressed-tensors, as llm-compressor writes it.
    CompressedTensors,
    /// AMD Quark.
    Quark,
    /// `quant_method: fp8`: DeepSeek's and Qwen's official files.
    Fp8,
}

/// How the keys and values of a cache were calibrated to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvCacheScheme {
    /// Not declared: as the engine likes.
    None,
    /// E4M3; a calibrated file has `k_scale` and `v_scale` for each layer.
    Fp8,
    /// Anything else, in the file's words.
    Other(String),
}

/// What the config declares for one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// E2M1 with an E8M0 scale for each 32.
    Mxfp4,
    /// E2M1 with an E4M3 scale for each 16 and one f32 for the tensor.
    Nvfp4 {
        /// What the inputs of the product were calibrated for.
        activations: ActivationScheme,
    },
    /// E4M3 with one scale for the tensor or for each row.
    Fp8,
    /// E4M3 with one scale for each 128 x 128.
    Fp8Blocks,
    /// A scheme that is known but not read, in the file's words.
    Other(String),
}

/// What the inputs of a product with NVFP4 weights were calibrated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActivationScheme {
    /// To stay as they are: W4A16.
    Unquantised,
    /// FP4 with block scales made at run time under one f32 from the file, for each linear. ModelOpt's `dynamic: false`
    /// and compressed-tensors' `dynamic: "local"` both mean this.
    StaticGlobal,
    /// FP4 with all scales made at run time.
    Dynamic,
}

/// The declaration of a whole checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// Who wrote the weights.
    pub producer: Producer,
    /// The producer's version, where the file has one.
    pub producer_version: Option<String>,
    /// How the KV cache was calibrated.
    pub kv_cache: KvCacheScheme,
    /// For messages.
    pub(super) file: String,
    pub(super) schemes: Vec<Scheme>,
    /// Modules that stay as they are. They win over `targets`.
    pub(super) excluded: Names,
    /// Modules and the index of their scheme.
    pub(super) targets: Names,
    /// The index of the scheme of all other modules.
    pub(super) default: Option<usize>,
}

impl Quantization {
    /// No quantisation: every module is plain.
    pub fn none() -> Self {
        Self::new(Producer::None, "config.json", Reach::OwnAndParents)
    }

    /// What is declared for a module (`model.layers.0.mlp.experts.3.gate_proj`); `None` where it is excluded or nothing
    /// is. A pattern of the file that takes too long on this name counts as not fitting it, and all others are still
    /// considered: see [`Quantization::resolve`].
    pub fn declared(&self, module: &str) -> Option<&Scheme> {
        match self.excluded.find_in_time(module) {
            Some(_) => None,
            None => self.targets.find_in_time(module).or(self.default).map(|i| &self.schemes[i]),
        }
    }

    /// Like [`Quantization::declared`], for those who must know.
    ///
    /// # Errors
    /// If a pattern of the file takes too long on this name.
    pub fn resolve(&self, module: &str) -> Result<Option<&Scheme>> {
        let find = |names: &Names| {
            let hostile =
                |reason: String| Error::file(&self.file, format!("quantization: {}", json::clip(&reason, 300)));
            names.find(module).map_err(hostile)
        };
        if find(&self.excluded)?.is_some() {
            return Ok(None);
        }
        Ok(find(&self.targets)?.or(self.default).map(|i| &self.schemes[i]))
    }

    /// All schemes that the declaration speaks of, each once.
    pub fn schemes(&self) -> &[Scheme] {
        &self.schemes
    }

    /// Reads the bytes of a `hf_quant_config.json`, called `file` in messages: what ModelOpt wrote before it put the
    /// same into `config.json`.
    pub(super) fn from_hf_quant_config(file: &str, bytes: &[u8], family: Family) -> Result<Self> {
        let map = json::object(file, bytes)?;
        let keys = Keys::new(file, &map);
        let Some(quantization) = keys.object("quantization")? else {
            return Err(keys.fault("quantization", "is missing, should be an object"));
        };
        let found = producers::modelopt(&quantization, keys.object("producer")?)?;
        found.check_family(&quantization, family).map(|()| found)
    }

    /// Reads the `quantization_config` of a `config.json`.
    pub(super) fn read(keys: &Keys, family: Family) -> Result<Self> {
        let supported = supported(family);
        let fault = |reason: String| keys.fault("quant_method", format!("{reason}; {supported}"));
        let Some(method) = keys.present("quant_method") else { return Err(fault("is missing".into())) };
        let found = match (method.as_str().unwrap_or_default(), family) {
            ("mxfp4", _) => producers::mxfp4(keys)?,
            ("modelopt", _) => producers::modelopt(keys, keys.object("producer")?)?,
            ("compressed-tensors", f) if f != Family::GptOss => producers::compressed_tensors(keys)?,
            ("quark", f) if f != Family::GptOss => producers::quark(keys)?,
            ("fp8", f) if f != Family::GptOss => producers::fp8(keys)?,
            _ => return Err(fault(format!("{} is not supported", super::shown(method)))),
        };
        found.check_family(keys, family).map(|()| found)
    }

    /// gpt-oss is read in MXFP4 and NVFP4 only.
    fn check_family(&self, keys: &Keys, family: Family) -> Result<()> {
        let fp4 = |scheme: &Scheme| matches!(scheme, Scheme::Mxfp4 | Scheme::Nvfp4 { .. });
        let other = self.schemes.iter().any(|scheme| !fp4(scheme));
        match family == Family::GptOss && other {
            true => Err(keys.fault("quant_algo", format!("is not NVFP4; {}", supported(family)))),
            false => Ok(()),
        }
    }

    pub(super) fn new(producer: Producer, file: &str, reach: Reach) -> Self {
        Self {
            producer,
            producer_version: None,
            kv_cache: KvCacheScheme::None,
            file: file.to_owned(),
            schemes: Vec::new(),
            excluded: Names::new(reach),
            targets: Names::new(reach),
            default: None,
        }
    }

    /// The index of a scheme, which is added where it is new.
    pub(super) fn index_of(&mut self, scheme: Scheme) -> usize {
        self.schemes.iter().position(|s| *s == scheme).unwrap_or_else(|| {
            self.schemes.push(scheme);
            self.schemes.len() - 1
        })
    }

    /// Excludes the modules of the list `key`, if there is one.
    pub(super) fn exclude(&mut self, keys: &Keys, key: &str) -> Result<()> {
        for entry in keys.strings(key)?.unwrap_or_default() {
            self.excluded.add(entry, 0).map_err(|reason| keys.fault(key, json::clip(&reason, 300)))?;
        }
        Ok(())
    }
}

fn supported(family: Family) -> &'static str {
    match family {
        Family::GptOss => "supported: \"mxfp4\", as openai/gpt-oss-20b is published, and \"modelopt\" with NVFP4",
        _ => "supported: \"modelopt\", \"compressed-tensors\", \"quark\", \"fp8\" and \"mxfp4\"",
    }
}
