//! Keys whose values are JSON of one type.
//!
//! Promise: what was put comes back equal; a value that is not such JSON is a `Corrupt` error that names the key,
//! never a panic and never a default.

use std::{fmt, marker::PhantomData};

use serde::{Serialize, de::DeserializeOwned};

use super::{KeyValue, Kv, Swap};
use crate::{
    backend::Revision,
    error::{Error, ErrorKind, Result},
};

/// Keys with values of type `T`. Made by [`Kv::json`].
pub struct JsonKv<T> {
    kv: Kv,
    // `fn() -> T`: the view is Send and Sync whatever T is.
    value: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for JsonKv<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JsonKv")
    }
}

impl<T> Clone for JsonKv<T> {
    fn clone(&self) -> Self {
        Self::new(self.kv.clone())
    }
}

impl<T> JsonKv<T> {
    pub(super) fn new(kv: Kv) -> Self {
        Self { kv, value: PhantomData }
    }
}

impl<T: Serialize + DeserializeOwned> JsonKv<T> {
    /// The value of a key with the revision that wrote it, if it exists.
    ///
    /// # Errors
    /// As for [`Kv::get`], and `Corrupt` if the value is not JSON of this type.
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn get(&self, key: &str) -> Result<Option<(T, Revision)>> {
        self.kv.get(key).await?.map(|found| self.decode(&found)).transpose()
    }

    /// Creates or replaces a key.
    ///
    /// # Errors
    /// As for [`Kv::put`], and `InvalidInput` if the value cannot be written as JSON.
    ///
    /// # Cancel safety
    /// As for [`Kv::put`].
    pub async fn put(&self, key: &str, value: &T) -> Result<Revision> {
        self.kv.put(key, encode(key, value)?).await
    }

    /// Creates a key; `None` if it exists already.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`Kv::put`].
    pub async fn create(&self, key: &str, value: &T) -> Result<Option<Revision>> {
        self.kv.create(key, encode(key, value)?).await
    }

    /// Replaces a key if it was last written at `expected`.
    ///
    /// # Errors
    /// As for [`put`](Self::put).
    ///
    /// # Cancel safety
    /// As for [`Kv::put`].
    pub async fn compare_and_swap(&self, key: &str, expected: Revision, value: &T) -> Result<Swap> {
        self.kv.compare_and_swap(key, expected, encode(key, value)?).await
    }

    /// Every key that starts with `prefix`, with its value.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    ///
    /// # Cancel safety
    /// It only reads.
    pub async fn list(&self, prefix: &str) -> Result<Vec<(String, T, Revision)>> {
        let listing = self.kv.list(prefix).await?;
        listing.entries.into_iter().map(|e| self.decode(&e).map(|(value, at)| (e.key, value, at))).collect()
    }

    /// Reads the value of an entry that came from a watch or a list.
    ///
    /// # Errors
    /// `Corrupt` if it is not JSON of this type.
    pub fn decode(&self, entry: &KeyValue) -> Result<(T, Revision)> {
        let value = serde_json::from_slice(&entry.value).map_err(|error| {
            // The position, not the text: a value may be a secret.
            let at = format!("the value is not the expected JSON, at line {} column {}", error.line(), error.column());
            Error::new(ErrorKind::Corrupt, "decode", at).key(&entry.key).on(self.kv.backend.profile().backend)
        })?;
        Ok((value, entry.modified))
    }
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::invalid("encode", e.to_string()).key(key))
}
