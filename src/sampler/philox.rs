//! Philox4x32-10: random numbers as a pure function of a key and a counter, so that a draw depends on its place alone.
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and its library Random123.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// 64 random bits for each seed, stream and position.
pub(super) fn bits(seed: [u32; 2], stream: [u32; 2], position: u64) -> u64 {
    let ([p0, p1], [s0, s1]) = (halves(position), stream);
    let [low, high, ..] = philox([p0, p1, s0, s1], seed);
    u64::from(high) << 32 | u64::from(low)
}

/// The low and the high half.
pub(super) fn halves(v: u64) -> [u32; 2] {
    [v as u32, (v >> 32) as u32]
}

/// A number in [0, 1), for tests.
#[cfg(test)]
pub(super) fn uniform(seed: u64, stream: u64, position: u64) -> f64 {
    (bits(halves(seed), halves(stream), position) >> 11) as f64 / (1u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [a, b] = [0, 1].map(|i| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]));
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [0, 1].map(|i| key[i].wrapping_add(WEYL[i]));
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        // Random123: tests/kat_vectors, "philox4x32 10".
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn every_input_bit_matters() {
        let base = uniform(1, 2, 3);
        for bit in 0..64 {
            let flip = 1u64 << bit;
            for other in [uniform(1 ^ flip, 2, 3), uniform(1, 2 ^ flip, 3), uniform(1, 2, 3 ^ flip)] {
                assert!(other != base && (0.0..1.0).contains(&other));
            }
        }
    }
}
