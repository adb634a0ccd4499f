//! A launch's slices as host memory, for the twins.

use crate::program::Access;

/// One slice: words of a buffer, to read or to write.
enum View<'a> {
    Read(&'a [u32]),
    Write(&'a mut [u32]),
}

/// The slices of one launch by name. Each is taken once.
#[derive(Default)]
pub struct Views<'a> {
    views: Vec<(&'static str, View<'a>)>,
}

impl<'a> Views<'a> {
    /// Add a slice that is only read.
    pub fn add_read(&mut self, name: &'static str, words: &'a [u32]) {
        self.views.push((name, View::Read(words)));
    }

    /// Add a slice that is written.
    pub fn add_write(&mut self, name: &'static str, words: &'a mut [u32]) {
        self.views.push((name, View::Write(words)));
    }

    /// Words of a slice that the launch reads.
    ///
    /// # Panics
    /// If the launch has no such slice: a broken promise between an op's recording and its twin.
    pub fn words(&mut self, name: &'static str) -> &'a [u32] {
        match self.take(name) {
            View::Read(words) => words,
            View::Write(words) => words,
        }
    }

    /// Words of a slice that the launch writes.
    ///
    /// # Panics
    /// As [`Self::words`], and if the slice was added to be read.
    pub fn words_mut(&mut self, name: &'static str) -> &'a mut [u32] {
        match self.take(name) {
            View::Write(words) => words,
            View::Read(_) => panic!("the twin writes {name}, which its launch only reads"),
        }
    }

    /// A slice as f32.
    pub fn f32(&mut self, name: &'static str) -> &'a [f32] {
        bytemuck::cast_slice(self.words(name))
    }

    /// A slice as f32, to write.
    pub fn f32_mut(&mut self, name: &'static str) -> &'a mut [f32] {
        bytemuck::cast_slice_mut(self.words_mut(name))
    }

    /// A slice as packed bf16.
    pub fn bf16(&mut self, name: &'static str) -> &'a [half::bf16] {
        bytemuck::cast_slice(self.words(name))
    }

    /// Whether the launch has this slice.
    pub fn has(&self, name: &str) -> bool {
        self.views.iter().any(|(n, _)| *n == name)
    }

    fn take(&mut self, name: &'static str) -> View<'a> {
        let at = self.views.iter().position(|(n, _)| *n == name);
        self.views.swap_remove(at.unwrap_or_else(|| panic!("the twin wants {name}, which its launch does not bind"))).1
    }
}

/// Bound as written by the twin?
pub(crate) fn is_written(access: Access) -> bool {
    access != Access::Read
}
