// SPDX-License-Identifier: Apache-2.0
//! Whether the API server is reached, said once for each time that this changes.

use std::{
    error::Error,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use kube::{Client, runtime::watcher};
use tokio::sync::Notify;

/// Between two tries to reach it again.
const RETRY: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(5);

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
            self.reached.store(wrong.is_none(), Ordering::Relaxed);
            match wrong {
                None => {
                    log::info!("the Kubernetes API server {} is reached", self.server);
                    complained = false;
                    self.lost.notified().await;
                    log::debug!("a watch at the Kubernetes API server has ended");
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
