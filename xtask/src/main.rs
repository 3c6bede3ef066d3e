//! The two commands of the repository: test and bench
fn main() {}
