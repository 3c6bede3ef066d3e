//! Discovery: which instances of a service there are.
//!
//! Promise: an instance says what it is once, as an [`Instance`], whatever the backend keeps it as.

mod instance;

pub use instance::{Health, Instance, MAX_WEIGHT};
