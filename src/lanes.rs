// SPDX-License-Identifier: Apache-2.0
//! Two lanes to one receiver: in a burst, what a process that stands still waits for does not stand behind the rest.

use tokio::sync::mpsc;

/// In each lane, so many wait; then whoever sends waits.
const PLACES: usize = 4096;

pub trait Urgent {
    /// Does something that is stopped wait for it? The order of those that are urgent is kept, and that of those that are not.
    fn is_urgent(&self) -> bool;
}

pub struct Sender<T> {
    urgent: mpsc::Sender<T>,
    usual: mpsc::Sender<T>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        Sender { urgent: self.urgent.clone(), usual: self.usual.clone() }
    }
}

pub struct Receiver<T> {
    urgent: mpsc::Receiver<T>,
    usual: mpsc::Receiver<T>,
}

/// The receiver is gone.
#[derive(Debug)]
pub struct Closed;

pub fn lanes<T: Urgent>() -> (Sender<T>, Receiver<T>) {
    let ((to_urgent, urgent), (to_usual, usual)) = (mpsc::channel(PLACES), mpsc::channel(PLACES));
    (Sender { urgent: to_urgent, usual: to_usual }, Receiver { urgent, usual })
}

impl<T: Urgent> Sender<T> {
    pub async fn send(&self, item: T) -> Result<(), Closed> {
        let lane = if item.is_urgent() { &self.urgent } else { &self.usual };
        lane.send(item).await.map_err(|_| Closed)
    }
}

impl<T> Receiver<T> {
    /// May be cancelled; nothing is lost. `None`: all senders are gone.
    pub async fn recv(&mut self) -> Option<T> {
        tokio::select! {
            biased;
            Some(item) = self.urgent.recv() => Some(item),
            item = self.usual.recv() => item,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Item(u32, bool);

    impl Urgent for Item {
        fn is_urgent(&self) -> bool {
            self.1
        }
    }

    #[tokio::test]
    async fn what_is_urgent_comes_first_and_each_lane_keeps_its_order() {
        let (sender, mut receiver) = lanes();
        for item in [Item(1, false), Item(2, true), Item(3, false), Item(4, true)] {
            sender.send(item).await.unwrap();
        }
        drop(sender);
        let mut came = Vec::new();
        while let Some(Item(number, _)) = receiver.recv().await {
            came.push(number);
        }
        assert_eq!(came, [2, 4, 1, 3]);
    }
}
