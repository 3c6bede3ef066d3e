//! Clusters whose servers are killed, stopped, cut off and restarted under work.
//!
//! Promise: after each blow everything works again; no answer is wrong, but for what the profile of the backend declares; and what a
//! client sees of it, in time, is printed.

mod contained;
mod containers;
pub mod node;
mod processes;
pub mod ring;
pub mod work;

use std::{sync::atomic::Ordering, time::Duration};

use tokio::time::Instant;

use ring::Ring;
use work::{App, INSTANCES};

use crate::site::connect;

/// From the end of a blow until everything works: elections, sessions that ended, and a busy machine.
const RECOVERY: Duration = Duration::from_secs(40);

/// Strikes every blow at a cluster of this kind, under work.
///
/// # Panics
/// If anything is wrong that the profile does not declare.
pub async fn under_all_blows(name: &'static str) {
    let ring = Ring::start(name).await.unwrap_or_else(|e| panic!("{e}"));
    let config = ring.config();
    let profile = connect(&config).await.profile().clone();
    let app = App::start(&config).await;
    let (turn, write, word) = ("no turn for", "no write for", "no news for");
    println!("\n{name:<15} {:<16} {turn:>12} {write:>12} {word:>12} {:>10}  long hold", "blow", "whole in");
    for blow in ring.blows() {
        let held = app.seen.held_lost.load(Ordering::Acquire);
        let began = Instant::now();
        ring.strike(blow).await;
        let whole = app.whole_again(RECOVERY).await;
        let lost = app.seen.held_lost.load(Ordering::Acquire) - held;
        let [turns, writes, news] =
            [&app.seen.turns, &app.seen.writes, &app.seen.news].map(|pulse| pulse.longest_gap(began));
        println!(
            "{name:<15} {:<16} {turns:>12.1?} {writes:>12.1?} {news:>12.1?} {whole:>10.1?}  {}",
            format!("{blow:?}"),
            if lost == 0 { "kept" } else { "lost, and told" }
        );
        assert!(writes <= blow.away() + RECOVERY, "{blow:?}: no write for {writes:?}");
    }
    let fewest = app.seen.fewest.load(Ordering::Acquire);
    match profile.early_end {
        // The catalog forgets a Consul server that dies, with what is registered there.
        Some(why) if fewest < INSTANCES => println!("{name}: a consumer saw only {fewest} instances; declared: {why}"),
        _ => assert_eq!(fewest, INSTANCES, "a consumer's set shrank although nobody left"),
    }
    let wrong = app.audit().await;
    match profile.early_end {
        Some(why) if !wrong.is_empty() && !profile.consensus => println!("{name}: {wrong:?}; declared: {why}"),
        _ => assert!(wrong.is_empty(), "{name}: {wrong:?}"),
    }
}
