//! The conformance suite of quorate, as a library, and its runs on five backends
