//! Each backend beside its raw client, in the same run, as ratios.
fn main() {}
