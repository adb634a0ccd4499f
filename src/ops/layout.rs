//! How kernels on a GPU want FP4 weights: the bits of a code where few masks and shifts find them, and the scales of four rows
//! in one word. A move of bytes and bits that loses nothing; the twins read weights as they lie on disk.

/// How bytes are laid out when they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As they are.
    Stored,
    /// E2M1 codes, two a byte: each word by [`laid_out`].
    Codes,
    /// Block scales, a byte each, in rows of so many: four rows side by side, and zeros behind the last.
    Scales(usize),
}

/// Where the bits of the eight codes of a word go. Codes j and j + 4 share a place in the halves of the word; code j, `s ee m`:
/// s to bit 15, ee m to bits 11..9 (j = 0), the same 8 bits lower (1), s to 8 and ee m to 14..12 (2), s to 0 and ee m to 6..4 (3).
fn laid_out(w: u32) -> u32 {
    let first = (w & 0x0008_0008) << 12 | (w & 0x0007_0007) << 9;
    let second = w & 0x0080_0080 | (w & 0x0070_0070) >> 3;
    let third = (w & 0x0800_0800) >> 3 | (w & 0x0700_0700) << 4;
    let fourth = (w & 0x8000_8000) >> 15 | (w & 0x7000_7000) >> 8;
    first | second | third | fourth
}

/// What [`laid_out`] was made of.
fn as_stored(w: u32) -> u32 {
    let first = (w & 0x8000_8000) >> 12 | (w & 0x0e00_0e00) >> 9;
    let second = w & 0x0080_0080 | (w & 0x000e_000e) << 3;
    let third = (w & 0x0100_0100) << 3 | (w & 0x7000_7000) >> 4;
    let fourth = (w & 0x0001_0001) << 15 | (w & 0x0070_0070) << 8;
    first | second | third | fourth
}

impl Layout {
    /// Bytes that `bytes` take.
    pub fn bytes(self, bytes: usize) -> usize {
        match self {
            Self::Stored | Self::Codes => bytes,
            Self::Scales(row) => bytes.next_multiple_of(4 * row),
        }
    }

    /// Lay out `from` in `to`, as many bytes as [`Layout::bytes`] says, whole words of codes.
    pub fn put(self, from: &[u8], to: &mut [u8]) {
        match self {
            Self::Stored => to.copy_from_slice(from),
            Self::Codes => {
                for (to, from) in to.as_chunks_mut::<4>().0.iter_mut().zip(from.as_chunks::<4>().0) {
                    *to = laid_out(u32::from_le_bytes(*from)).to_le_bytes();
                }
            }
            Self::Scales(row) => {
                for (to, from) in to.chunks_exact_mut(4 * row).zip(from.chunks(4 * row)) {
                    for (r, from) in from.chunks_exact(row).enumerate() {
                        for (to, from) in to.as_chunks_mut::<4>().0.iter_mut().zip(from) {
                            to[r] = *from;
                        }
                    }
                    let missing = 4 - from.len() / row;
                    for to in to.as_chunks_mut::<4>().0 {
                        to[4 - missing..].fill(0);
                    }
                }
            }
        }
    }

    /// Pieces, one behind the other, laid out.
    pub fn of(self, pieces: &[&[u8]]) -> Vec<u8> {
        let bytes = pieces.concat();
        let mut out = vec![0; self.bytes(bytes.len())];
        self.put(&bytes, &mut out);
        out
    }

    /// What was laid out in `from`, `to.len()` bytes of it.
    pub fn get(self, from: &[u8], to: &mut [u8]) {
        match self {
            Self::Stored => to.copy_from_slice(&from[..to.len()]),
            Self::Codes => {
                for (to, from) in to.as_chunks_mut::<4>().0.iter_mut().zip(from.as_chunks::<4>().0) {
                    *to = as_stored(u32::from_le_bytes(*from)).to_le_bytes();
                }
            }
            Self::Scales(row) => {
                for (i, to) in to.iter_mut().enumerate() {
                    let (r, i) = (i / row, i % row);
                    *to = from[(r / 4 * row + i) * 4 + r % 4];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_word_has_a_place_of_its_own() {
        let places: Vec<u32> = (0..32).map(|bit| laid_out(1 << bit)).collect();
        assert!(places.iter().all(|place| place.count_ones() == 1));
        assert_eq!(places.iter().fold(0, |all, place| all | place), u32::MAX);
        for w in [0, 1, 0x8421_7653, 0xfedc_ba98, u32::MAX] {
            assert_eq!(
                places.iter().enumerate().filter(|(bit, _)| w >> bit & 1 == 1).map(|(_, p)| p).sum::<u32>(),
                laid_out(w)
            );
            assert_eq!(as_stored(laid_out(w)), w);
            assert_eq!(laid_out(as_stored(w)), w);
        }
    }

    #[test]
    fn four_rows_of_scales_stand_side_by_side() {
        let scales: Vec<u8> = (1..=18).collect(); // six rows of three
        let layout = Layout::Scales(3);
        let mut out = vec![9; layout.bytes(scales.len())];
        layout.put(&scales, &mut out);
        assert_eq!(out, [1, 4, 7, 10, 2, 5, 8, 11, 3, 6, 9, 12, 13, 16, 0, 0, 14, 17, 0, 0, 15, 18, 0, 0]);
    }

    #[test]
    fn every_scale_is_found_again() {
        for (rows, row) in (1..10).flat_map(|rows| [1, 6, 90].map(|row| (rows, row))) {
            let scales: Vec<u8> = (0..rows * row).map(|i| (i % 251 + 1) as u8).collect();
            let layout = Layout::Scales(row);
            let mut out = vec![9; layout.bytes(scales.len())];
            layout.put(&scales, &mut out);
            let mut found = vec![0; scales.len()];
            layout.get(&out, &mut found);
            assert!(found == scales, "{rows} rows of {row}");
            assert_eq!(out.iter().filter(|byte| **byte == 0).count(), out.len() - scales.len(), "zeros behind");
        }
    }
}
