//! `godwit agent`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use godwit_node::agent::{self, Config};
use godwit_node::client::DEFAULT_ADDRESS;
use godwit_protocol::request::DEFAULT_PORT;

use crate::error::Result;

/// Let containers that other hosts migrate come to this host
///
/// Run it on every host that containers are to move to, beside its containerd. It prepares what the container
/// needs (image, snapshot, record) and lets its shim restore it; a migration that fails leaves nothing behind.
/// SIGTERM stops it, after the migrations that are under way.
///
///     godwit agent --listen 10.0.0.2
///
/// There is no encryption and no authentication yet: whoever can connect can start containers here, and sees
/// their memory pass. Listen on an address of a network you trust. The log goes to stderr.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Agent {
    /// Address, and port if it is not 7450, to listen on
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "127.0.0.1", value_parser = parse_listen)]
    listen: SocketAddr,
    /// Socket of this host's containerd
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_ADDRESS)]
    containerd: PathBuf,
}

impl Agent {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let config = Config {
            listen: self.listen,
            containerd: self.containerd.clone(),
            directory: PathBuf::from(agent::DIRECTORY),
        };
        let agent = agent::Agent::bind(config)?;
        let listen = self.listen;
        if !listen.ip().is_loopback() {
            log::warn!(
                "nothing that passes {listen} is encrypted, and whoever reaches it can start containers here: \
                 the network must be trusted"
            );
        }
        log::info!("listening on {listen} for containers to come to {}", self.containerd.display());
        agent.serve()?;
        Ok(ExitCode::SUCCESS)
    }
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    text.parse::<SocketAddr>()
        .or_else(|_| bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DEFAULT_PORT)))
        .map_err(|_| "expected an IP address, and a port after a colon, such as 10.0.0.2:7450".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_go_without_a_port() {
        for (text, expected) in [
            ("10.0.0.2", "10.0.0.2:7450"),
            ("10.0.0.2:1", "10.0.0.2:1"),
            ("::1", "[::1]:7450"),
            ("[::1]", "[::1]:7450"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(parse_listen(text).unwrap().to_string(), expected);
        }
        for bad in ["", "node-b", "10.0.0.2:x", ":7450"] {
            assert!(parse_listen(bad).is_err(), "{bad}");
        }
    }
}
