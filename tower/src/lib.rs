//! The instances of a service for [tower]'s balancers, and so for clients made with tonic.
//!
//! Promise: a balancer over [`Discover`] has a service for each instance that is registered and passing, and for no
//! other; it keeps what it has for as long as the coordinator cannot be reached. [`Resting`] keeps requests away from an
//! instance that fails before its registration ends.
//!
//! ```
//! use std::time::Duration;
//! use quorate_core::{Coordinator, Instance};
//! use quorate_tower::{Discover, Resting};
//! use tower::{balance::p2c::Balance, load::{CompleteOnResponse, PeakEwma}, service_fn, timeout::Timeout};
//!
//! # async fn show(coord: Coordinator) -> quorate_core::Result<()> {
//! let orders = coord.discover("orders").await?;
//! let balance = Balance::new(Discover::new(&orders, |instance: &Instance| {
//!     let endpoint = instance.endpoint(); // for tonic: Endpoint::from_shared(format!("http://{endpoint}"))?.connect_lazy()
//!     let client = service_fn(move |request: u32| std::future::ready(Ok::<_, std::io::Error>((endpoint.clone(), request))));
//!     let client = Resting::new(Timeout::new(client, Duration::from_secs(1)), Duration::from_secs(2), |_| true);
//!     Ok::<_, std::io::Error>(PeakEwma::new(client, Duration::from_millis(30), 1e10, CompleteOnResponse::default()))
//! }));
//! # let _: Balance<_, u32> = balance; Ok(())
//! # }
//! ```
//!
//! Without a need for tower, [`Balancer`](quorate_core::balance::Balancer) does more: it tries *another* instance, by key
//! or weight where that is asked for, and ejects for longer each time.

mod discover;
mod resting;

pub use discover::{BoxError, Discover, Key};
pub use resting::{ResponseFuture, Resting};
