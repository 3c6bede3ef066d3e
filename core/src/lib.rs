//! The waist, sessions, layers and recipes of quorate; knows no client library
