//! A fleet in one process: `cargo run --example fleet`, on a server with
//! `cargo run --example fleet --features etcd -- etcd://127.0.0.1:2379`.
//!
//! Ten nodes, each with a runtime and a connection of its own, so that one can be killed as a process is: everything it
//! does stops in the middle, and nobody says goodbye.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    sync::{Arc, Mutex},
    time::Duration,
};

use quorate::{
    Config, Coordinator, Result,
    balance::{Balancer, Ejection, PeakEwma, Strategy},
    discovery::{Instance, Service},
};
use tokio::{
    runtime::Runtime,
    time::{Instant, sleep, timeout},
};

const NODES: usize = 10;
const PARTITIONS: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// What the nodes say of themselves, for the display only.
#[derive(Default)]
struct Board {
    partitions: BTreeMap<u32, String>,
    leader: Option<(u64, String)>,
}

type Shared = Arc<Mutex<Board>>;

fn on(board: &Shared) -> std::sync::MutexGuard<'_, Board> {
    board.lock().expect("nobody panics while writing on the board")
}

struct Node {
    id: String,
    // Shut down without a word to kill the node. `None` only while it is dropped.
    runtime: Option<Runtime>,
}

/// Dropping it kills the node.
impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Node {
    fn start(number: usize, config: &Config, board: &Shared) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let id = format!("node-{number:02}");
        let (name, config, board) = (id.clone(), config.clone(), board.clone());
        runtime.spawn(async move {
            if let Err(error) = serve(number, &name, &config, board).await {
                println!("   {name} gives up: {error}");
            }
        });
        Ok(Self { id, runtime: Some(runtime) })
    }
}

/// What a node does: it can be found, works on its share of the partitions, and stands for election.
async fn serve(number: usize, name: &str, config: &Config, board: Shared) -> Result<()> {
    let coord = quorate::connect_with(config).await?;
    let zone = if number.is_multiple_of(2) { "east" } else { "west" };
    let address = format!("10.0.0.{number}:8080");
    let _registration = coord.register(Instance::new("shop", address).id(name).zone(zone))?;
    let mut share = coord.partitions("orders", PARTITIONS).join(name).await?;
    let (worker, notes) = (name.to_owned(), board.clone());
    tokio::spawn(async move {
        loop {
            let partition = share.next().await;
            let (worker, notes) = (worker.clone(), notes.clone());
            tokio::spawn(async move {
                on(&notes).partitions.insert(partition.index(), worker);
                let _ = partition.run(std::future::pending::<()>()).await;
            });
        }
    });
    let lead = async |term: u64| {
        on(&board).leader = Some((term, name.to_owned()));
        std::future::pending::<ControlFlow<()>>().await
    };
    coord.election("shop-leader").run_while_leader(name, |leadership| lead(leadership.term().get())).await
}

fn chapter(number: usize, title: &str) {
    println!("\n{number}. {title}\n{}", "-".repeat(title.len() + 3));
}

/// One row for each node: how many requests it got, what it works on, who leads.
fn display(service: &Service, board: &Shared, requests: &BTreeMap<String, usize>) {
    let board = on(board);
    let most = requests.values().copied().max().unwrap_or(1).max(1);
    for instance in service.now().iter() {
        let count = requests.get(&instance.id).copied().unwrap_or(0);
        let own = |(index, owner): (&u32, &String)| (*owner == instance.id).then(|| index.to_string());
        let own: Vec<String> = board.partitions.iter().filter_map(own).collect();
        let leads = board.leader.as_ref().filter(|(_, leader)| *leader == instance.id);
        let crown = leads.map(|(term, _)| format!("leads, term {term}")).unwrap_or_default();
        let bar = "#".repeat(count * 20 / most);
        println!("   {}  {count:>4} {bar:<20}  partitions {:<14} {crown}", instance.id, own.join(" "));
    }
}

/// Sends requests for a while; those to a dead node fail, and it is left out for a while.
async fn requests(balancer: &Balancer, alive: &BTreeSet<String>, count: usize) -> (BTreeMap<String, usize>, usize) {
    let (mut served, mut failed) = (BTreeMap::new(), 0);
    for _ in 0..count {
        let Some(pick) = balancer.pick() else { continue };
        // One of them is slow, and gets less.
        sleep(Duration::from_micros(if pick.id == "node-03" { 3000 } else { 300 })).await;
        if alive.contains(&pick.id) {
            *served.entry(pick.id.clone()).or_default() += 1;
            pick.success();
        } else {
            failed += 1;
            pick.failure();
        }
    }
    (served, failed)
}

/// Waits until every partition has an owner among the living, and somebody alive leads.
async fn settled(board: &Shared, alive: &BTreeSet<String>) -> Duration {
    let started = Instant::now();
    let whole = async {
        loop {
            {
                let board = on(board);
                let owned = board.partitions.values().filter(|owner| alive.contains(*owner)).count();
                let mut shares: BTreeMap<&String, usize> = BTreeMap::new();
                board.partitions.values().for_each(|owner| *shares.entry(owner).or_default() += 1);
                let even = shares.values().all(|share| *share <= (PARTITIONS as usize).div_ceil(alive.len()));
                let led = board.leader.as_ref().is_some_and(|(_, leader)| alive.contains(leader));
                if owned == PARTITIONS as usize && even && led {
                    return;
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, whole).await.expect("the fleet settles");
    started.elapsed()
}

fn ids(nodes: &[Node]) -> BTreeSet<String> {
    nodes.iter().map(|node| node.id.clone()).collect()
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://fleet/fleet".to_owned());
    let mut config = Config::parse(&url)?;
    if config.namespace.is_empty() {
        config = config.with_namespace("quorate-fleet")?;
    }
    // Short, so that a death is noticed while somebody looks.
    let config = config.with_session_ttl(Duration::from_secs(2));
    Runtime::new()?.block_on(show(&config))
}

async fn show(config: &Config) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let coord: Coordinator = quorate::connect_with(config).await?;
    println!("quorate on {}. The same code runs on every backend; only the URL differs.", coord.profile().backend);
    let board = Shared::default();
    let service = coord.discover("shop").await?;
    // Newcomers are taken for as fast as the rest, and what was slow is tried again soon.
    let times = PeakEwma { initial: Duration::from_millis(1), decay: Duration::from_secs(1), ..PeakEwma::default() };
    let balancer = Balancer::builder(Strategy::PeakEwma(times)).eject(Ejection::default()).build();
    balancer.follow(&service);

    chapter(1, "Ten nodes start");
    let started = Instant::now();
    let mut nodes = (1..=NODES).map(|number| Node::start(number, config, &board)).collect::<Result<Vec<_>, _>>()?;
    timeout(PATIENCE, service.until(|now| now.len() == NODES)).await?;
    println!("   all found after {} ms", started.elapsed().as_millis());
    let took = settled(&board, &ids(&nodes)).await;
    println!("   {PARTITIONS} partitions spread and a leader elected {} ms later", took.as_millis());

    chapter(2, "Requests, spread by two choices and latency");
    let (served, _) = requests(&balancer, &ids(&nodes), 1500).await;
    display(&service, &board, &served);
    println!("   node-03 is ten times slower than the others, so it gets less.");

    chapter(3, "Some nodes are killed, the leader among them");
    let leader = on(&board).leader.clone().map(|(_, leader)| leader).unwrap_or_default();
    let (doomed, living): (Vec<Node>, Vec<Node>) =
        nodes.into_iter().partition(|node| node.id == leader || ["node-05", "node-06", "node-07"].contains(&&*node.id));
    nodes = living;
    let (alive, killed) = (ids(&nodes), ids(&doomed));
    drop(doomed);
    let killed_at = Instant::now();
    println!("   killed: {}", killed.iter().cloned().collect::<Vec<_>>().join(", "));
    let (_, failed) = requests(&balancer, &alive, 800).await;
    println!("   of 800 requests sent at once {failed} went to a dead node before it was left out");
    timeout(PATIENCE, service.until(|now| now.len() == alive.len())).await?;
    println!("   gone from discovery {} ms after the kill, with a session of 2 s", killed_at.elapsed().as_millis());
    settled(&board, &alive).await;
    println!("   their partitions and the leadership taken over {} ms after the kill", killed_at.elapsed().as_millis());
    let (served, failed) = requests(&balancer, &alive, 1500).await;
    display(&service, &board, &served);
    println!("   {failed} requests failed.");

    chapter(4, "One node comes back");
    nodes.push(Node::start(5, config, &board)?);
    timeout(PATIENCE, service.until(|now| now.len() == nodes.len())).await?;
    let took = settled(&board, &ids(&nodes)).await;
    let (served, _) = requests(&balancer, &ids(&nodes), 1500).await;
    display(&service, &board, &served);
    println!("   It has its share of requests and partitions again after {} ms.", took.as_millis());

    drop(nodes);
    coord.close().await?;
    println!("\nThat is all. What the nodes left in the store ends with their sessions.");
    Ok(())
}
