//! Element types as safetensors files name them.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $disk:ident, $text:literal, $bits:literal;)*) => {
        /// The element type of a tensor on disk.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Dtype { $($(#[$doc])* $name,)* }

        impl Dtype {
            /// Bits of one element.
            pub fn bits(self) -> usize {
                match self { $(Self::$name => $bits,)* }
            }

            /// The word that stands in the file's header.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            pub(crate) fn from_word(word: &str) -> Option<Self> {
                match word { $($text => Some(Self::$name),)* _ => None }
            }

            /// The same type in the words of the `safetensors` crate.
            pub(crate) fn on_disk(self) -> safetensors::Dtype {
                match self { $(Self::$name => safetensors::Dtype::$disk,)* }
            }
        }

        #[cfg(test)]
        const ALL: &[Dtype] = &[$(Dtype::$name),*];
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool = BOOL, "BOOL", 8;
    /// E2M1, two elements a byte.
    F4 = F4, "F4", 4;
    /// E2M3, six bits.
    F6E2M3 = F6_E2M3, "F6_E2M3", 6;
    /// E3M2, six bits.
    F6E3M2 = F6_E3M2, "F6_E3M2", 6;
    /// Unsigned byte; MXFP4 blocks and scales are published as these.
    U8 = U8, "U8", 8;
    /// Signed byte.
    I8 = I8, "I8", 8;
    /// E5M2, eight bits.
    F8E5M2 = F8_E5M2, "F8_E5M2", 8;
    /// E4M3 without infinities, eight bits; NVFP4's block scales.
    F8E4M3 = F8_E4M3, "F8_E4M3", 8;
    /// E8M0, eight bits: a power of two; MXFP4's block scales.
    F8E8M0 = F8_E8M0, "F8_E8M0", 8;
    /// E4M3 without negative zero.
    F8E4M3Fnuz = F8_E4M3FNUZ, "F8_E4M3FNUZ", 8;
    /// E5M2 without negative zero.
    F8E5M2Fnuz = F8_E5M2FNUZ, "F8_E5M2FNUZ", 8;
    /// 16-bit signed integer.
    I16 = I16, "I16", 16;
    /// 16-bit unsigned integer.
    U16 = U16, "U16", 16;
    /// IEEE half precision.
    F16 = F16, "F16", 16;
    /// The high half of an f32.
    Bf16 = BF16, "BF16", 16;
    /// 32-bit signed integer.
    I32 = I32, "I32", 32;
    /// 32-bit unsigned integer.
    U32 = U32, "U32", 32;
    /// IEEE single precision.
    F32 = F32, "F32", 32;
    /// Two f32: a complex number.
    C64 = C64, "C64", 64;
    /// IEEE double precision.
    F64 = F64, "F64", 64;
    /// 64-bit signed integer.
    I64 = I64, "I64", 64;
    /// 64-bit unsigned integer.
    U64 = U64, "U64", 64;
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_sizes_are_those_of_the_safetensors_crate() {
        for &dtype in ALL {
            assert_eq!(Dtype::from_word(dtype.word()), Some(dtype));
            assert_eq!(dtype.bits(), dtype.on_disk().bitsize());
            let read: safetensors::Dtype = serde_json::from_str(&format!("\"{dtype}\"")).unwrap();
            assert_eq!(read, dtype.on_disk());
        }
    }
}
