//! Locks under chaos: refused requests, lost replies and delays on every verb, by seed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quorate_core::{
    Coordinator,
    layer::{Chaos, Limit, Retry, Stack, Timeout},
    lock::FencingToken,
};

use super::{coord, coord_over, until_tickets};
use crate::{
    Clients,
    support::{cases, client, spawn, within},
};

cases!("chaos":
    locks_exclude_and_leave_nothing_under_chaos,
    counters_by_swap_count_no_applied_write_twice_under_chaos,
);

pub(super) async fn troubled(clients: &Arc<dyn Clients>, seed: u64) -> Coordinator {
    let backend = Stack::new(client(clients).await)
        .with(Chaos::uniform(seed, 0.05, Duration::from_millis(5)))
        .with(Limit::default())
        .with(Timeout::new(Duration::from_secs(10)))
        .with(Retry::default())
        .build();
    coord_over(backend, Duration::from_secs(30))
}

async fn locks_exclude_and_leave_nothing_under_chaos(clients: Arc<dyn Clients>) {
    const TURNS: usize = 10;
    let inside = Arc::new(AtomicUsize::new(0));
    let tokens = Arc::new(std::sync::Mutex::new(Vec::<FencingToken>::new()));
    let mut tasks = Vec::new();
    for seed in 0..8 {
        let coord = troubled(&clients, seed).await;
        let (inside, tokens) = (inside.clone(), tokens.clone());
        tasks.push(spawn(async move {
            let mut granted = 0;
            while granted < TURNS {
                // An error is honest here; what counts is that nothing is left behind by it.
                let Ok(guard) = coord.lock("job").acquire().await else { continue };
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two inside");
                tokens.lock().expect("no poison").push(guard.token());
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                granted += 1;
                let _ = guard.release().await;
            }
        }));
    }
    for task in &mut tasks {
        within(Duration::from_secs(50), "all turns", &mut task.0).await.expect("no task fails");
    }
    let calm = coord(&clients).await;
    until_tickets(&calm, "job", 0).await;
    let tokens = tokens.lock().expect("no poison");
    assert_eq!(tokens.len(), 8 * TURNS);
    assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]), "tokens rise in the order of grants");
}

async fn counters_by_swap_count_no_applied_write_twice_under_chaos(clients: Arc<dyn Clients>) {
    let (mut applied, mut unsure) = (0, 0);
    let kv = troubled(&clients, 42).await.kv().json::<u32>();
    for _ in 0..60 {
        let Ok(now) = kv.get("counter").await else { continue };
        let outcome = match now {
            None => kv.create("counter", &1).await.map(|created| created.is_some()),
            Some((now, at)) => {
                let swap = kv.compare_and_swap("counter", at, &(now + 1)).await;
                swap.map(|swap| matches!(swap, quorate_core::Swap::Applied(_)))
            }
        };
        match outcome {
            Ok(done) => applied += u32::from(done),
            Err(error) if error.kind() == quorate_core::ErrorKind::Ambiguous => unsure += 1,
            Err(_) => {}
        }
    }
    let calm = coord(&clients).await.kv().json::<u32>();
    let total = calm.get("counter").await.expect("get").map_or(0, |(total, _)| total);
    assert!(applied > 0, "chaos left nothing to test");
    assert!(total >= applied && total <= applied + unsure, "{applied} applied, {unsure} unsure, {total} counted");
}
