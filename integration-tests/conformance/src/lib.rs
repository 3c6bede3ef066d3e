//! The contract of a quorate backend as named test cases.
