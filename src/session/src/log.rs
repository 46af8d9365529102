//! The bytes of a journal: in memory, or in a place that somebody else provides.
//!
//! Pure. The invariant: [`Log::bytes`] is everything that was appended, less what was cut off its
//! front and its end, wherever it is.

use std::fmt::Debug;

/// A place for a log that is too large for memory.
pub trait Spill: Debug + Send + Sync {
    /// Appends all of `bytes`.
    ///
    /// # Errors
    /// Why they are not kept; what was there before still is, behind it anything may be.
    fn append(&mut self, bytes: &[u8]) -> Result<(), String>;

    /// Cuts off everything behind the first `len` bytes.
    fn truncate(&mut self, len: usize);

    /// Everything that is there.
    fn bytes(&self) -> &[u8];
}

/// The log.
#[derive(Debug)]
pub(crate) enum Log {
    Memory(Vec<u8>),
    Elsewhere(Box<dyn Spill>),
}

impl Default for Log {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl Log {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Elsewhere(place) => place.bytes(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// How many of the bytes are in memory.
    pub(crate) fn in_memory(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::Elsewhere(_) => 0,
        }
    }

    pub(crate) fn is_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }

    pub(crate) fn append(&mut self, more: &[u8]) -> Result<(), String> {
        match self {
            Self::Memory(bytes) => bytes.extend_from_slice(more),
            Self::Elsewhere(place) => place.append(more)?,
        }
        Ok(())
    }

    /// Appends what `write` does to the end of what it is given.
    pub(crate) fn append_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), String> {
        match self {
            Self::Memory(bytes) => write(bytes),
            Self::Elsewhere(place) => {
                let mut more = Vec::new();
                write(&mut more);
                place.append(&more)?;
            }
        }
        Ok(())
    }

    pub(crate) fn spill(&mut self, mut to: Box<dyn Spill>) -> Result<(), String> {
        to.append(self.bytes())?;
        *self = Self::Elsewhere(to);
        Ok(())
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        match self {
            Self::Memory(bytes) => bytes.truncate(len),
            Self::Elsewhere(place) => place.truncate(len),
        }
    }

    /// Forgets the first `end` bytes; what is left of a log elsewhere comes back to memory.
    pub(crate) fn drop_front(&mut self, end: usize) {
        match self {
            Self::Memory(bytes) => drop(bytes.drain(..end.min(bytes.len()))),
            Self::Elsewhere(_) if end == 0 => {}
            Self::Elsewhere(place) => {
                let rest = place.bytes().get(end..).unwrap_or_default();
                *self = Self::Memory(rest.to_vec());
            }
        }
    }

    /// Forgets everything, but keeps `capacity` bytes of memory where it has them.
    pub(crate) fn clear(&mut self, capacity: usize) {
        match self {
            Self::Memory(bytes) => bytes.clear(),
            Self::Elsewhere(_) => *self = Self::default(),
        }
        self.shrink_to(capacity);
    }

    pub(crate) fn shrink_to(&mut self, capacity: usize) {
        if let Self::Memory(bytes) = self {
            bytes.shrink_to(capacity);
        }
    }
}
