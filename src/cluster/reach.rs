// SPDX-License-Identifier: Apache-2.0
//! Whether the API server is reached, said once for each time that this changes.

use std::{
    error::Error,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use kube::{
    Client,
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff},
    },
};
use tokio::sync::Notify;

/// Between two tries to reach it again.
const RETRY: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(5);
/// Between two tries of a watch, at most.
const WATCH: Duration = Duration::from_secs(10);

pub struct Reach {
    server: String,
    reached: AtomicBool,
    lost: Notify,
}

impl Reach {
    pub fn new(server: String) -> Reach {
        Reach { server, reached: AtomicBool::new(false), lost: Notify::new() }
    }

    pub fn is_reached(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// Asks for a sign of life at the start and whenever a watch has failed, until there is one.
    pub async fn keep(&self, client: &Client) {
        let mut complained = false;
        loop {
            let answer = tokio::time::timeout(ANSWER, client.apiserver_version()).await;
            let wrong = match answer {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(in_one_line(&error)),
                Err(_) => Some(format!("no answer in {} s", ANSWER.as_secs())),
            };
            let was_reached = self.reached.swap(wrong.is_none(), Ordering::Relaxed);
            match wrong {
                None => {
                    if !was_reached {
                        log::info!("the Kubernetes API server {} is reached", self.server);
                    }
                    complained = false;
                    self.lost.notified().await;
                }
                Some(error) => {
                    if !complained {
                        log::warn!(
                            "the Kubernetes API server {} is not reached: {error}; the router goes on with what it knows",
                            self.server
                        );
                    }
                    complained = true;
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Of this, a watch complains: what the server answers, and refuses, once; what does not reach it, not at all.
    pub fn failed(&self, what: &str, error: &watcher::Error, complained: &mut Option<String>) {
        let text = in_one_line(error);
        if !is_an_answer(error) {
            log::debug!("{what}: {text}");
            self.lost.notify_one();
        } else if complained.as_ref() != Some(&text) {
            log::warn!(
                "the Kubernetes API server shows no {what}: {text}; does the router's role allow get, list and watch?"
            );
            *complained = Some(text);
        }
    }
}

fn is_an_answer(error: &watcher::Error) -> bool {
    let source = match error {
        watcher::Error::InitialListFailed(source)
        | watcher::Error::WatchStartFailed(source)
        | watcher::Error::WatchFailed(source) => source,
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => return true,
    };
    matches!(source, kube::Error::Api(_))
}

/// As other clients of the API server wait, later and later, but no longer than for [`WATCH`].
#[derive(Default)]
pub struct Patience(DefaultBackoff);

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|delay| delay.min(WATCH))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// The error and its causes, each said once.
pub fn in_one_line(error: &(dyn Error + 'static)) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !said.contains(&text) {
            said = format!("{said}: {text}");
        }
        cause = error.source();
    }
    said
}
