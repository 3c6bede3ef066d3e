//! In-process backend for quorate: the same contract with no server, and faults on request
