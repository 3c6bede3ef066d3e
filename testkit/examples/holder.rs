//! Starts an etcd server, says its process id, port and data directory, and waits to be killed.

use quorate_testkit::servers::{Etcd, EtcdOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let etcd = Etcd::start(EtcdOptions::default()).await?;
    let pid = etcd.pid().ok_or("the server ended")?;
    println!("{pid} {} {}", etcd.port(), etcd.data_dir().display());
    std::future::pending::<()>().await;
    Ok(())
}
