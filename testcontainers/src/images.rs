//! Which image each server runs, and how it is started: the same for the published images and for those of docker/.

use std::{borrow::Cow, env, fmt};

use testcontainers::{ContainerRequest, GenericImage, ImageExt, core::IntoContainerPort};

/// Which coordinator a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// etcd.
    Etcd,
    /// Redis.
    Redis,
    /// Valkey.
    Valkey,
    /// Consul.
    Consul,
    /// ZooKeeper.
    ZooKeeper,
}

impl Kind {
    /// The scheme of its URLs.
    pub(crate) fn scheme(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::Redis | Self::Valkey => "redis",
            Self::Consul => "consul",
            Self::ZooKeeper => "zookeeper",
        }
    }

    /// The port that its clients connect to, inside.
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Etcd => 2379,
            Self::Redis | Self::Valkey => 6379,
            Self::Consul => 8500,
            Self::ZooKeeper => 2181,
        }
    }

    /// The published image, in the version that quorate's own tests run. etcd's is published outside of the default registry:
    /// this name is of one that `docker/images.sh` builds, unless `QUORATE_ETCD_IMAGE` names another.
    pub fn published_image(self) -> &'static str {
        match self {
            Self::Etcd => "localhost/quorate/etcd:local",
            Self::Redis => "redis:7.0.15",
            Self::Valkey => "valkey/valkey:8.1.1",
            Self::Consul => "consul:1.8.7",
            Self::ZooKeeper => "zookeeper:3.8.0",
        }
    }

    /// The image that is used: the environment's, or else the published one.
    pub fn image(self) -> String {
        let variable = format!("QUORATE_{}_IMAGE", self.to_string().to_uppercase());
        env::var(variable).ok().filter(|name| !name.is_empty()).unwrap_or_else(|| self.published_image().to_owned())
    }

    /// What is run, with the settings that quorate's own tests use.
    pub(crate) fn request(self, published_port: u16) -> ContainerRequest<GenericImage> {
        let image = self.image();
        let (name, tag) = split(&image);
        let image = GenericImage::new(name, tag).with_exposed_port(self.port().tcp());
        match self {
            Self::Etcd => image.with_cmd(etcd(published_port)),
            Self::Redis | Self::Valkey => image.with_cmd(redis(self)),
            Self::Consul => image.with_cmd(CONSUL),
            Self::ZooKeeper => {
                image.with_copy_to("/conf/zoo.cfg", ZOO_CFG.as_bytes().to_vec()).with_env_var("JVMFLAGS", JVM)
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Etcd => "etcd",
            Self::Redis => "Redis",
            Self::Valkey => "Valkey",
            Self::Consul => "Consul",
            Self::ZooKeeper => "ZooKeeper",
        })
    }
}

/// The short election lets sessions of 1 s be granted as asked: etcd grants none below 1.5 elections.
fn etcd(published_port: u16) -> Vec<Cow<'static, str>> {
    vec![
        "etcd".into(),
        "--name=quorate".into(),
        "--data-dir=/var/lib/etcd/quorate".into(),
        "--listen-client-urls=http://0.0.0.0:2379".into(),
        format!("--advertise-client-urls=http://127.0.0.1:{published_port}").into(),
        "--heartbeat-interval=50".into(),
        "--election-timeout=250".into(),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ]
}

/// Locks and fencing tokens must survive a restart, so every write is on disk before it is answered.
fn redis(kind: Kind) -> [&'static str; 13] {
    let program = if kind == Kind::Valkey { "valkey-server" } else { "redis-server" };
    [
        program,
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--dir",
        "/data",
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ]
}

/// All connections come from one address, the bridge's; Consul would take 200 of them.
const CONSUL: [&str; 10] = [
    "consul",
    "agent",
    "-server",
    "-bootstrap",
    "-node=quorate",
    "-bind=127.0.0.1",
    "-client=0.0.0.0",
    "-data-dir=/consul/data",
    "-log-level=warn",
    "-hcl=performance { raft_multiplier = 1 } limits { http_max_conns_per_client = 4000 } disable_update_check = true",
];

/// Nothing waits for the disk: a kill loses nothing that was handed to the kernel, and tests share their disk with builds.
const JVM: &str = "-Xmx128m -Dzookeeper.extendedTypesEnabled=true -Dzookeeper.forceSync=no";

/// Sessions last 2 to 20 ticks: with this one, 1 s to 10 s.
const ZOO_CFG: &str = "tickTime=500\ndataDir=/data\nclientPort=2181\nmaxClientCnxns=0\nadmin.enableServer=false\n";

/// `name:tag`, also where a registry's port precedes. A digest stays with the name, as Docker wants it.
fn split(image: &str) -> (&str, &str) {
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (image, "latest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_split_at_its_tag_and_not_at_a_port() {
        assert_eq!(split("redis:7"), ("redis", "7"));
        assert_eq!(split("redis"), ("redis", "latest"));
        assert_eq!(split("mirror.invalid:5000/a/redis"), ("mirror.invalid:5000/a/redis", "latest"));
        assert_eq!(split("mirror.invalid:5000/a/redis:7"), ("mirror.invalid:5000/a/redis", "7"));
        // GenericImage joins both with a colon again.
        assert_eq!(split("redis@sha256:0a"), ("redis@sha256", "0a"));
    }
}
