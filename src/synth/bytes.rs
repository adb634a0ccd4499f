//! The bytes of synthetic weights: endless random arenas, of which every tensor is a window. A word of an arena depends
//! on the seed and on its place alone, so any run of bytes can be made by anybody, in any order.

/// Random bytes of one kind, from which tensors take windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arena {
    /// Any byte.
    Codes,
    /// Scales of MXFP4: a row of uniform codes times these has a norm of about one.
    E8m0,
    /// Scales of NVFP4 from 64 to 448.
    E4m3,
    /// Normal numbers whose rows have a norm of about one.
    Bf16,
    /// Ones.
    Gains,
    /// The one f32 of NVFP4 tensors.
    Globals,
}

pub(super) const ARENAS: [Arena; 6] =
    [Arena::Codes, Arena::E8m0, Arena::E4m3, Arena::Bf16, Arena::Gains, Arena::Globals];

/// Bytes of an arena that count on from one number. A thread takes whole ones.
const PIECE: usize = 1 << 22;

/// The golden ratio of 2^64, by which the generator counts.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What stands where in the arenas of a model.
pub(super) struct Bytes {
    /// What a seed changes of every word's number; nothing for seed 0.
    seed: u64,
    /// The middle one of three E8M0 scales.
    e8m0: u8,
    /// Numbers to draw from.
    normal: Vec<u16>,
    global: f32,
}

impl Bytes {
    /// Of a model with rows of `hidden_size` elements.
    pub(super) fn new(hidden_size: usize, seed: u64) -> Self {
        // The root mean square of E2M1 codes is 2.93.
        let norm = 1.0 / (hidden_size as f64).sqrt();
        Self {
            seed: if seed == 0 { 0 } else { mixed(seed.wrapping_mul(STEP)) },
            e8m0: ((norm / 2.93).log2().round() as i32 + 127) as u8,
            normal: normal_table(norm),
            global: (norm / (2.93 * 200.0)) as f32,
        }
    }

    /// Bytes of an arena from `offset` on.
    pub(super) fn fill(&self, arena: Arena, offset: usize, out: &mut [u8]) {
        match arena {
            Arena::Codes => self.words(1, offset, out, u64::to_le_bytes),
            Arena::E8m0 => self.words(2, offset, out, |word| word.to_le_bytes().map(|b| self.e8m0 - 1 + b % 3)),
            Arena::E4m3 => self.words(3, offset, out, |word| word.to_le_bytes().map(|b| 0x68 + b % 23)),
            Arena::Bf16 => {
                let normal: &[u16; 4096] = self.normal.as_slice().try_into().expect("the table has so many");
                self.words(4, offset, out, |word| {
                    let mut bytes = [0; 8];
                    for (i, pair) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                        *pair = normal[(word >> (16 * i)) as usize & 0xfff].to_le_bytes();
                    }
                    bytes
                });
            }
            Arena::Gains => repeated([0x80, 0x3f], offset, out),
            Arena::Globals => repeated(self.global.to_le_bytes(), offset, out),
        }
    }

    /// The first `len` bytes of an arena, made by all cores.
    pub(super) fn arena(&self, arena: Arena, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = len.div_ceil(threads).next_multiple_of(PIECE);
        std::thread::scope(|scope| {
            for (i, run) in bytes.chunks_mut(share).enumerate() {
                scope.spawn(move || self.fill(arena, i * share, run));
            }
        });
        bytes
    }

    /// Bytes from `offset` on of what `form` makes of the words of stream `number`.
    fn words(&self, number: u64, offset: usize, out: &mut [u8], form: impl Fn(u64) -> [u8; 8]) {
        let (mut offset, mut out) = (offset, out);
        while !out.is_empty() {
            let within = offset % PIECE;
            let (run, rest) = out.split_at_mut(out.len().min(PIECE - within));
            let start = self.seed ^ number << 56 ^ ((offset / PIECE) as u64) << 24;
            let word = |at: usize| form(mixed(start.wrapping_add(STEP.wrapping_mul(at as u64 + 1))));
            let (at, skip) = (within / 8, within % 8);
            let head = if skip == 0 { 0 } else { run.len().min(8 - skip) };
            let (first, run) = run.split_at_mut(head);
            first.copy_from_slice(&word(at)[skip..][..head]);
            let at = at + usize::from(skip > 0);
            offset += head + run.len();
            let (whole, tail) = run.as_chunks_mut::<8>();
            let n = whole.len();
            for (i, eight) in whole.iter_mut().enumerate() {
                *eight = word(at + i);
            }
            if !tail.is_empty() {
                tail.copy_from_slice(&word(at + n)[..tail.len()]);
            }
            out = rest;
        }
    }
}

/// A pattern over and over, from place `offset` on.
fn repeated<const N: usize>(pattern: [u8; N], offset: usize, out: &mut [u8]) {
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = pattern[(offset + i) % N];
    }
}

/// 4096 bf16 numbers whose distribution is normal with this standard deviation, in no order.
fn normal_table(sigma: f64) -> Vec<u16> {
    let mut state = 7u64;
    let mut uniform = || {
        state = state.wrapping_add(STEP);
        mixed(state) as f64 / u64::MAX as f64
    };
    let mut sum = || (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
    (0..4096).map(|_| half::bf16::from_f64(sum() * sigma).to_bits()).collect()
}

/// The output function of Steele, Lea and Flood's generator, whose state only counts: good enough for weights that mean
/// nothing.
fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes as the generator gives them one after the other.
    fn in_order(number: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in 0..len.div_ceil(PIECE) as u64 {
            let mut state = number << 56 ^ piece << 24;
            for _ in 0..PIECE / 8 {
                state = state.wrapping_add(STEP);
                bytes.extend(mixed(state).to_le_bytes());
            }
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn bytes_depend_on_their_place_alone() {
        let bytes = Bytes::new(2880, 0);
        let len = 2 * PIECE + 1234;
        assert_eq!(bytes.arena(Arena::Codes, len), in_order(1, len), "codes in order, made by several threads");
        for arena in ARENAS {
            let whole = bytes.arena(arena, len);
            // Runs that begin and end inside words, and across pieces.
            for (from, until) in [(0, 5), (3, 4), (1, 40), (PIECE - 13, PIECE + 21), (PIECE + 7, len), (8, 4096)] {
                let mut run = vec![0xaa; until - from];
                bytes.fill(arena, from, &mut run);
                assert_eq!(run, whole[from..until], "{arena:?} {from}..{until}");
            }
        }
    }

    #[test]
    fn seeds_differ_and_scales_stay_sane() {
        let (zero, one) = (Bytes::new(2048, 0), Bytes::new(2048, 1));
        for arena in [Arena::Codes, Arena::E8m0, Arena::E4m3, Arena::Bf16] {
            let (a, b) = (zero.arena(arena, 4096), one.arena(arena, 4096));
            assert_ne!(a, b, "{arena:?}");
            assert_eq!(b, Bytes::new(2048, 1).arena(arena, 4096), "{arena:?}");
        }
        assert!(one.arena(Arena::E4m3, 65536).iter().all(|b| (0x68..=0x7e).contains(b)));
        assert_eq!(one.arena(Arena::Gains, 4), [0x80, 0x3f, 0x80, 0x3f]);
        let squares: f64 = one
            .arena(Arena::Bf16, 1 << 16)
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f64::from(half::bf16::from_le_bytes(*b)).powi(2))
            .sum();
        assert!((squares / 32768.0 * 2048.0 - 1.0).abs() < 0.1, "rows have a norm of about one: {squares}");
    }
}
