// SPDX-License-Identifier: Apache-2.0
//! `router flows --watch`: the flows on a terminal, as they change. [`model`] knows what is shown, [`screen`] draws it.
//!
//! A thread asks the router, so that keys are answered also while it is slow. Whatever ends the program, the terminal is
//! given back as it was.

mod model;
mod screen;

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use ratatui::crossterm::event::{self, Event};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{
    control::{self, Question},
    coordinator::FlowView,
};
use model::{Model, Then};

/// Between two questions to the router.
const REFRESH: Duration = Duration::from_secs(1);
/// How soon a signal or an answer is noticed.
const TICK: Duration = Duration::from_millis(100);

type Answer = Result<Vec<FlowView>, String>;

pub fn run(control: &Path) -> Result<()> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        bail!("--watch needs a terminal: use `router flows` or `router flows --json` here");
    }
    let told_to_end = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&told_to_end)).context("signals cannot be heard")?;
    }
    let mut model = Model::default();
    // Before the terminal is taken: a router that is not there is one line.
    let flows = control::ask(control, &Question::Flows)?;
    model.take(Instant::now(), flows);
    let answers = ask_for_ever(control.to_owned())?;
    // Its panic hook gives the terminal back, too.
    let mut terminal = ratatui::try_init().context("the terminal cannot be used")?;
    let end = show(&mut terminal, &mut model, &answers, &told_to_end);
    ratatui::restore();
    end
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    model: &mut Model,
    answers: &Receiver<Answer>,
    told_to_end: &AtomicBool,
) -> Result<()> {
    while !told_to_end.load(Ordering::Relaxed) {
        terminal.draw(|frame| screen::draw(frame, model)).context("drawing")?;
        // A change of size is an event as well, and drawn.
        if event::poll(TICK).context("reading keys")?
            && let Event::Key(key) = event::read().context("reading keys")?
            && key.is_press()
            && model.press(key) == Then::Quit
        {
            break;
        }
        for answer in answers.try_iter() {
            match answer {
                Ok(flows) => model.take(Instant::now(), flows),
                Err(error) => model.fail(error),
            }
        }
    }
    Ok(())
}

fn ask_for_ever(control: PathBuf) -> Result<Receiver<Answer>> {
    let (sender, receiver) = sync_channel(1);
    let ask = move || {
        loop {
            std::thread::sleep(REFRESH);
            let answer = control::ask(&control, &Question::Flows).map_err(|error| error.to_string());
            if sender.send(answer).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("ask".into()).spawn(ask).context("no thread to ask the router")?;
    Ok(receiver)
}
