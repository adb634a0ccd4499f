//! The divergence lab: what a run computed, stage by stage, kept in a file; and where two runs part.

pub mod bisect;
pub mod calibration;
pub mod compare;
pub mod file;
pub mod probe;
pub mod record;
pub mod report;
