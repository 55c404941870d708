// SPDX-License-Identifier: Apache-2.0
//! Which routers are believed, and what about.
//!
//! Routers authenticate each other by certificates of one authority. A certificate holds the IP addresses of its node,
//! and its owner may speak for these only: the address that a session comes from, or goes to, must be among them, and
//! so must the address that it offers for host connections. What it says about a connection counts if one of them is
//! where our own discovery finds the other end (`coordinator/ledger/peers.rs`).
//!
//! The witness of a transaction, and the host connections, end up in applications: they are bare TCP, opened by a
//! single-use token that went through the authenticated session.

mod certificate;
mod credentials;
pub mod pki;

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use clap::Args;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

pub use credentials::{Credentials, TrustError, addresses_of};

use credentials::Files;

/// Between two looks at files that may have changed.
const LOOK: Duration = Duration::from_secs(2);
/// Between two reminders that nobody is authenticated.
const REMINDER: Duration = Duration::from_secs(600);

#[derive(Args, Clone, Debug)]
pub struct TrustSettings {
    /// Directory with this node's certificate (tls.crt), its key (tls.key) and the authority (ca.crt), as `router pki`
    /// or cert-manager makes them. They are read again when they change.
    #[arg(long = "tls", env = "ROUTER_TLS", default_value = "/etc/ebpf-router/tls", value_name = "DIR")]
    pub directory: PathBuf,

    /// Speak plain TCP to other routers, and believe whoever connects. For tests only.
    #[arg(long, env = "ROUTER_INSECURE", num_args = 0..=1, default_missing_value = "true", default_value = "false",
          value_name = "true|false", action = clap::ArgAction::Set)]
    pub insecure: bool,
}

/// What `router check` finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    Insecure,
    Unusable(String),
    /// Peers will not take it, or soon.
    Worrying(String),
    Good(String),
}

impl Tls {
    pub fn look(settings: &TrustSettings, host_address: Option<IpAddr>) -> Tls {
        if settings.insecure {
            return Tls::Insecure;
        }
        match Files::read(&settings.directory).and_then(|files| Credentials::new(&files)) {
            Err(error) => Tls::Unusable(error.to_string()),
            Ok(credentials) => match credentials.concern(SystemTime::now(), host_address) {
                Some(concern) => Tls::Worrying(concern),
                None => Tls::Good(credentials.to_string()),
            },
        }
    }
}

/// Whom this router believes now.
#[derive(Clone)]
pub enum Trust {
    /// Everybody.
    Insecure,
    Certified(watch::Receiver<Arc<Credentials>>),
}

impl Trust {
    /// Read the certificates, and from then on whenever they change. What is wrong later is logged, and the last that
    /// were right stay in force.
    pub fn open(settings: &TrustSettings, host_address: IpAddr) -> Result<Trust, TrustError> {
        if settings.insecure {
            tokio::spawn(remind());
            return Ok(Trust::Insecure);
        }
        let files = Files::read(&settings.directory)?;
        let credentials = Credentials::new(&files)?;
        log::info!("this node's certificate: {credentials}");
        let (sender, receiver) = watch::channel(Arc::new(credentials));
        tokio::spawn(keep_fresh(files, host_address, sender));
        Ok(Trust::Certified(receiver))
    }

    /// Comes when other authorities are in force than at the last call: whom they do not know is to be asked again.
    pub async fn other_authorities(&mut self) {
        let Trust::Certified(credentials) = self else { return std::future::pending().await };
        loop {
            let before = Arc::clone(&credentials.borrow_and_update());
            if credentials.changed().await.is_err() {
                return std::future::pending().await;
            }
            if !credentials.borrow().has_authorities_of(&before) {
                return;
            }
        }
    }
}

async fn remind() {
    let mut ticks = interval(REMINDER);
    loop {
        ticks.tick().await;
        log::warn!(
            "INSECURE: anybody who reaches ROUTER_PORT can move this host's connections; give certificates (ROUTER_TLS) in place of --insecure"
        );
    }
}

async fn keep_fresh(mut files: Files, host_address: IpAddr, credentials: watch::Sender<Arc<Credentials>>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut concern = None;
    let mut wrong: Option<String> = None;
    let mut complained = false;
    loop {
        ticks.tick().await;
        if credentials.is_closed() {
            return;
        }
        match files.changed() {
            Ok(None) => (wrong, complained) = (None, false),
            Ok(Some((found, read))) => {
                log::info!("this node's certificate has changed: {read}");
                (files, wrong, complained) = (found, None, false);
                credentials.send_replace(Arc::new(read));
            }
            Err(error) => {
                // Half of a change may be seen once.
                let (error, before) = (error.to_string(), wrong.take());
                if before.as_ref() != Some(&error) {
                    complained = false;
                } else if !complained {
                    log::error!("the certificates stay as they were: {error}");
                    complained = true;
                }
                wrong = Some(error);
            }
        }
        let now = credentials.borrow().concern(SystemTime::now(), Some(host_address));
        if now != concern {
            if let Some(text) = &now {
                log::warn!("this node's certificate {text}");
            }
            concern = now;
        }
    }
}

/// The router at the other end of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where the session comes from.
    pub address: IpAddr,
    /// All addresses in its certificate; `None`: it was not asked for one.
    certified: Option<Arc<[IpAddr]>>,
}

impl Node {
    pub fn uncertified(address: IpAddr) -> Node {
        Node { address, certified: None }
    }

    pub fn certified(address: IpAddr, addresses: Vec<IpAddr>) -> Node {
        Node { address, certified: Some(addresses.into()) }
    }

    /// May it speak for the router of this address?
    pub fn speaks_for(&self, address: IpAddr) -> bool {
        self.address == address || self.certified.as_ref().is_some_and(|held| held.contains(&address))
    }

    /// May it let us connect to this address?
    pub fn may_offer(&self, address: IpAddr) -> bool {
        self.certified.as_ref().is_none_or(|held| held.contains(&address))
    }
}
