//! The layers, over memory with faults on request.
#![cfg(feature = "memory")]
#![allow(clippy::unwrap_used, reason = "the helpers of a test may fail it, too")]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate::{
    Backend, Dir, ErrorKind, Key, KeyRange, Result, Txn, Write,
    layer::{Chaos, Fault, Limit, Metrics, Op, Retry, Rule, Stack, Timeout, Trace, Verb, Wrap},
    memory::Memory,
};
use tokio::time::Instant;

fn range() -> KeyRange {
    KeyRange::prefix(&Dir::new(["kv"]).unwrap(), "").unwrap()
}

fn put() -> Txn {
    let key = Key::new(&Dir::new(["kv"]).unwrap(), "k").unwrap();
    Txn { checks: Vec::new(), writes: vec![Write::Put { key, value: "hunter2".into(), lease: None }] }
}

fn over(memory: &Arc<Memory>, wrap: impl Wrap) -> Arc<dyn Backend> {
    Stack::new(memory.clone()).with(wrap).build()
}

fn short_retry() -> Retry {
    Retry::new(3, Duration::from_millis(10), Duration::from_millis(40))
}

/// Notes every call that comes through.
#[derive(Debug, Clone, Default)]
struct Seen(Arc<Mutex<Vec<Verb>>>);

impl Wrap for Seen {
    async fn call<'a, T, F, Fut>(&'a self, op: Op<'a>, call: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Fut + Send + Sync + 'a,
        Fut: Future<Output = Result<T>> + Send + 'a,
    {
        self.0.lock().unwrap().push(op.verb);
        call().await
    }
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_write_is_ambiguous_and_an_unanswered_read_unavailable() {
    let memory = Arc::new(Memory::new());
    let limit = Duration::from_millis(100);
    let backend = over(&memory, Timeout::new(limit));
    memory.faults().pause();
    let started = Instant::now();
    let write = backend.commit(&put()).await.unwrap_err();
    assert_eq!((write.kind(), started.elapsed()), (ErrorKind::Ambiguous, limit));
    assert_eq!(backend.read(&range()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let shown = format!("{write} {write:?}");
    assert!(shown.contains("kv/k") && shown.contains("memory") && !shown.contains("hunter2"), "{shown}");
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_ticket_has_no_time_limit() {
    let memory = Arc::new(Memory::new());
    let coord = quorate::Coordinator::new(over(&memory, Timeout::new(Duration::from_millis(10))), Default::default());
    let guard = coord.lock("job").acquire().await.unwrap();
    let waited = coord.lock("job").acquire_within(Duration::from_secs(60)).await.unwrap();
    assert!(waited.is_none() && guard.is_held());
}

#[tokio::test(start_paused = true)]
async fn what_surely_was_not_applied_is_repeated() {
    let memory = Arc::new(Memory::new());
    let seen = Seen::default();
    let backend = Stack::new(memory.clone()).with(seen.clone()).with(short_retry()).build();
    memory.faults().fail([Verb::Commit], 2, ErrorKind::Unavailable);
    assert!(backend.commit(&put()).await.unwrap().applied);
    assert_eq!(seen.0.lock().unwrap().len(), 3);
    memory.faults().fail([Verb::Commit], 9, ErrorKind::Unavailable);
    assert_eq!(backend.commit(&put()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(seen.0.lock().unwrap().len(), 7, "one attempt and three repeats");
}

#[tokio::test(start_paused = true)]
async fn a_put_that_may_have_happened_is_never_repeated() {
    let memory = Arc::new(Memory::new());
    let seen = Seen::default();
    let backend = Stack::new(memory.clone()).with(seen.clone()).with(short_retry()).build();
    memory.faults().lose_reply([Verb::Commit], 1);
    assert_eq!(backend.commit(&put()).await.unwrap_err().kind(), ErrorKind::Ambiguous);
    assert_eq!(seen.0.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_not_repeated() {
    let memory = Arc::new(Memory::new());
    let seen = Seen::default();
    let backend = Stack::new(memory.clone()).with(seen.clone()).with(short_retry()).build();
    for kind in [ErrorKind::Denied, ErrorKind::InvalidInput, ErrorKind::SessionLost, ErrorKind::Unsupported] {
        memory.faults().fail([Verb::Read], 1, kind);
        assert_eq!(backend.read(&range()).await.unwrap_err().kind(), kind);
    }
    assert_eq!(seen.0.lock().unwrap().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn an_unsure_attempt_is_not_forgotten_by_a_later_one_that_surely_failed() {
    let memory = Arc::new(Memory::new());
    let backend = over(&memory, short_retry());
    memory.faults().lose_reply([Verb::Grant], 1);
    memory.faults().fail([Verb::Grant], 9, ErrorKind::Unavailable);
    // Repeatable, so it goes on; but the first attempt may have been applied.
    assert_eq!(backend.grant(Duration::from_secs(1)).await.unwrap_err().kind(), ErrorKind::Ambiguous);
}

#[tokio::test(start_paused = true)]
async fn no_more_calls_than_the_limit_are_under_way_but_leases_pass() {
    let memory = Arc::new(Memory::new());
    let backend = over(&memory, Limit::new(2));
    let lease = backend.grant(Duration::from_secs(10)).await.unwrap();
    memory.faults().delay([Verb::Read], 4, Duration::from_secs(1));
    let started = Instant::now();
    let range = range();
    let reads = futures(4, || backend.read(&range));
    let renewed = async {
        backend.renew(&lease.id).await.unwrap();
        started.elapsed()
    };
    let (reads, renewed) = tokio::join!(reads, renewed);
    assert_eq!(reads, 4);
    assert_eq!(started.elapsed(), Duration::from_secs(2), "two at a time");
    assert_eq!(renewed, Duration::ZERO, "a renewal does not queue behind reads");
}

/// Polls `count` futures together; how many were `Ok`.
async fn futures<T, F: Future<Output = Result<T>>>(count: usize, make: impl Fn() -> F) -> usize {
    let mut all: Vec<_> = (0..count).map(|_| Box::pin(make())).collect();
    let mut good = 0;
    std::future::poll_fn(|cx| {
        all.retain_mut(|f| match f.as_mut().poll(cx) {
            std::task::Poll::Ready(outcome) => {
                good += usize::from(outcome.is_ok());
                false
            }
            std::task::Poll::Pending => true,
        });
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    good
}

async fn outcomes_under_chaos(seed: u64) -> Vec<Option<ErrorKind>> {
    let backend = over(&Arc::new(Memory::new()), Chaos::uniform(seed, 0.2, Duration::from_millis(5)));
    let mut outcomes = Vec::new();
    for _ in 0..200 {
        outcomes.push(backend.commit(&put()).await.err().map(|e| e.kind()));
        outcomes.push(backend.read(&range()).await.err().map(|e| e.kind()));
    }
    outcomes
}

#[tokio::test(start_paused = true)]
async fn chaos_is_the_same_for_the_same_seed() {
    let (first, again, other) =
        (outcomes_under_chaos(1).await, outcomes_under_chaos(1).await, outcomes_under_chaos(2).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    let kinds: BTreeSet<_> = first.iter().flatten().map(|kind| kind.as_str()).collect();
    assert_eq!(kinds, BTreeSet::from(["ambiguous", "unavailable"]), "both kinds of fault struck");
}

#[tokio::test(start_paused = true)]
async fn chaos_strikes_every_verb() {
    let memory = Arc::new(Memory::new());
    let lease = memory.grant(Duration::from_secs(60)).await.unwrap();
    let refuse = Rule { fault: Fault::Refuse, probability: 1.0, verbs: Vec::new() };
    let seen = Seen::default();
    let backend = Stack::new(memory.clone()).with(Chaos::new(1, vec![refuse])).with(seen.clone()).build();
    let line = Dir::new(["lock", "job"]).unwrap();
    let entry = quorate::Enqueue {
        line: line.clone(),
        kind: quorate::TicketKind::Lock,
        lease: lease.id.clone(),
        nonce: quorate::Nonce::random(),
        value: Default::default(),
        depth: 1,
        when_free: false,
    };
    let ticket = memory.enqueue(&entry).await.unwrap().unwrap().ticket;
    let kinds = [
        backend.grant(Duration::from_secs(1)).await.err(),
        backend.renew(&lease.id).await.err(),
        backend.revoke(&lease.id).await.err(),
        backend.read(&range()).await.err(),
        backend.commit(&put()).await.err(),
        backend.watch(&range()).await.err(),
        backend.enqueue(&entry).await.err(),
        backend.look(&ticket, 1).await.err(),
        backend.line(&line).await.err(),
        backend.gone(&ticket).await.err(),
        backend.clock().await.err(),
    ];
    assert!(kinds.iter().all(|e| e.as_ref().is_some_and(|e| e.kind() == ErrorKind::Unavailable)), "{kinds:?}");
    assert_eq!(*seen.0.lock().unwrap(), Verb::ALL);
}

#[test]
fn metrics_count_calls_by_backend_verb_and_outcome() {
    let recorder = metrics_util::debugging::DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let memory = Arc::new(Memory::new());
            let backend = over(&memory, Metrics::new("memory"));
            backend.commit(&put()).await.unwrap();
            backend.commit(&put()).await.unwrap();
            memory.faults().fail([Verb::Commit], 1, ErrorKind::Denied);
            backend.commit(&put()).await.unwrap_err();
        });
    });
    let mut counts = Vec::new();
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        let key = key.key();
        let labels: Vec<_> = key.labels().map(|l| format!("{}={}", l.key(), l.value())).collect();
        if labels.iter().any(|l| l == "verb=commit") {
            let value = match value {
                metrics_util::debugging::DebugValue::Counter(n) => n,
                metrics_util::debugging::DebugValue::Histogram(times) => times.len() as u64,
                metrics_util::debugging::DebugValue::Gauge(_) => panic!("no gauge is documented"),
            };
            counts.push(format!("{} {} {value}", key.name(), labels.join(" ")));
        }
    }
    counts.sort();
    assert_eq!(
        counts,
        [
            "quorate_call_seconds backend=memory verb=commit 3",
            "quorate_calls_total backend=memory verb=commit outcome=denied 1",
            "quorate_calls_total backend=memory verb=commit outcome=ok 2",
        ]
    );
}

#[test]
fn traces_name_verb_subject_and_backend_and_no_value() {
    let text = Arc::new(Mutex::new(Vec::new()));
    let writer = Captured(text.clone());
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let memory = Arc::new(Memory::new());
            memory.faults().fail([Verb::Commit], 1, ErrorKind::Denied);
            over(&memory, Trace).commit(&put()).await.unwrap_err();
        });
    });
    let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
    for part in ["quorate", "commit", "kv/k", "memory", "denied"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert!(!text.contains("hunter2"), "{text}");
}

#[derive(Clone)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
