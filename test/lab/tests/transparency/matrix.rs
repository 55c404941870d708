// SPDX-License-Identifier: Apache-2.0
//! A row of the matrix: how it is tested, and how its outcome is written down for `lab transparency`.

use std::{
    panic::Location,
    path::PathBuf,
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    DEADLINE, Family, Flow, Place, Pod, Process, RULE_FOR_ALL_PODS, RULE_FOR_ALL_PODS_V6, RouterOptions,
    Scene, program, transparency, wait_for,
};

/// Moves there and back again while a connection is in its state.
const ROUNDS: u32 = 3;

/// How long it is moved in a state that ends by itself, after two seconds: the last part of it is undisturbed.
const LASTS: Duration = Duration::from_millis(1600);

/// The lab of all tests here; it ends with this process.
///
/// What an application sees is the matter here, not how fast the machine is: megabytes may take longer than the default
/// budget.
pub fn scene() -> Result<&'static Scene> {
    static SCENE: OnceLock<Result<Scene>> = OnceLock::new();
    let scene = SCENE.get_or_init(|| {
        let scene = Scene::without_routers("transparency")?;
        // However young: some connections here live for milliseconds.
        let rules = scene.lab.h1.write_rules("v4", &format!("{RULE_FOR_ALL_PODS}after=0\n"))?;
        std::fs::write(rules.join("v6"), format!("{RULE_FOR_ALL_PODS_V6}after=0\n"))?;
        scene.lab.start_everything(&RouterOptions::with_rules(&rules).with("FREEZE_BUDGET_MS", "500"))?;
        Ok(scene)
    });
    scene.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))
}

/// One that no other test has.
pub fn new_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(7000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A part of the table.
pub struct Group(pub &'static str);

/// A line of the table.
pub struct Row {
    group: &'static str,
    behaviour: &'static str,
    /// What the test does.
    test: &'static str,
    line: u32,
}

impl Group {
    #[track_caller]
    pub const fn row(&self, behaviour: &'static str, test: &'static str) -> Row {
        Row { group: self.0, behaviour, test, line: Location::caller().line() }
    }
}

impl Row {
    /// The connection moves, and nobody can tell.
    pub fn kept(&self, case: impl Into<Case>) -> Result<()> {
        let mut connection = Connection::enter(&case.into())?;
        let moved = connection.move_about();
        connection.leave_after(moved)?;
        self.is_kept()
    }

    /// The connection stays where it is for this reason, and nobody can tell that it was looked at.
    pub fn refused(&self, label: &str, case: impl Into<Case>) -> Result<()> {
        let connection = Connection::enter(&case.into())?;
        let refused = connection.expect_refused(label);
        connection.leave_after(refused)?;
        self.is_refused(label)
    }

    pub fn is_kept(&self) -> Result<()> {
        self.record(transparency::Outcome::Kept)
    }

    pub fn is_refused(&self, label: &str) -> Result<()> {
        self.record(transparency::Outcome::Refused(label.to_owned()))
    }

    fn record(&self, outcome: transparency::Outcome) -> Result<()> {
        transparency::record(&transparency::Row {
            group: self.group.to_owned(),
            behaviour: self.behaviour.to_owned(),
            test: self.test.to_owned(),
            line: self.line,
            outcome,
        })
    }
}

/// How the two programs of a connection are started.
#[derive(Clone)]
pub struct Case {
    pub behaviour: &'static str,
    pub family: Family,
    /// Words before the subject's own command line.
    pub wrapper: Vec<String>,
    /// Another program that takes the same arguments as the subject.
    pub program: Option<PathBuf>,
    /// Of the subject.
    pub environment: Vec<(String, String)>,
    /// What the subject connects to, instead of the partner's own address.
    pub connect_to: Option<String>,
    /// Move for as long as the state lasts by itself.
    pub while_it_lasts: bool,
}

impl From<&'static str> for Case {
    fn from(behaviour: &'static str) -> Case {
        Case {
            behaviour,
            family: Family::V4,
            wrapper: vec![],
            program: None,
            environment: vec![],
            connect_to: None,
            while_it_lasts: false,
        }
    }
}

impl Case {
    /// The state ends by itself, when the subject says so.
    pub fn while_it_lasts(behaviour: &'static str) -> Case {
        Case { while_it_lasts: true, ..Case::from(behaviour) }
    }

    fn subject(&self, address: &str) -> Result<Command> {
        let path = match &self.program {
            Some(path) => path.clone(),
            None => program("behaviour")?,
        };
        let words: Vec<String> =
            self.wrapper.iter().cloned().chain([path.to_string_lossy().into()]).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args([self.behaviour, "subject", address]);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// Subject and partner, in their state, their connection on the overlay until somebody moves it.
pub struct Connection {
    pub scene: &'static Scene,
    pub subject: Process,
    pub partner: Process,
    pub port: u16,
    while_it_lasts: bool,
}

impl Connection {
    /// Between the pods `client` and `server`; on the overlay until somebody orders something else.
    pub fn enter(case: &Case) -> Result<Connection> {
        let scene = scene()?;
        let mut connection = Connection::start(scene.client.place(), &scene.server, case)?;
        connection.hold()?;
        connection.begin()?;
        Ok(connection)
    }

    /// Connected, not yet in the state.
    pub fn start(client: &Place, server: &Pod, case: &Case) -> Result<Connection> {
        Connection::start_on(new_port(), client, server, case)
    }

    pub fn start_on(port: u16, client: &Place, server: &Pod, case: &Case) -> Result<Connection> {
        let scene = scene()?;
        let address = server.address(case.family, port).to_string();
        let name = |side: &str| format!("{}-{port}-{side}", case.behaviour);
        let mut partner = Command::new(program("behaviour")?);
        partner.args([case.behaviour, "partner", &address]);
        let mut partner = server.spawn(&name("partner"), &mut partner)?;
        partner.wait_until_it_says("listening", DEADLINE)?;
        let mut subject = client
            .spawn(&name("subject"), &mut case.subject(case.connect_to.as_ref().unwrap_or(&address))?)?;
        subject.wait_until_it_says("connected", DEADLINE)?;
        partner.wait_until_it_says("connected", DEADLINE)?;
        Ok(Connection { scene, subject, partner, port, while_it_lasts: case.while_it_lasts })
    }

    /// The rules have it swapped at once. Sent back by hand, it waits for orders.
    pub fn hold(&self) -> Result<()> {
        self.scene.lab.h1.wait_for_flow(self.port, "known", |_| true)?;
        self.move_to("host")?;
        self.move_to("overlay")
    }

    /// Both into the state.
    pub fn begin(&mut self) -> Result<()> {
        for side in [&mut self.partner, &mut self.subject] {
            side.tell("enter")?;
            side.wait_until_it_says("ready", DEADLINE)?;
        }
        Ok(())
    }

    /// To and fro, ordered by each host in turn.
    pub fn move_about(&mut self) -> Result<()> {
        let started = Instant::now();
        let mut moves = 0;
        let goes_on = |connection: &mut Connection, moves| match connection.while_it_lasts {
            true => !connection.is_over() && started.elapsed() < LASTS,
            false => moves < 2 * ROUNDS,
        };
        while goes_on(self, moves) {
            let moved = self.move_to(["host", "overlay"][moves as usize % 2]);
            if moved.is_err() && self.while_it_lasts && self.is_over() {
                break;
            }
            moved.with_context(|| format!("move {}", moves + 1))?;
            moves += 1;
        }
        ensure!(moves > 0, "it was not moved while it lasted");
        Ok(())
    }

    fn is_over(&mut self) -> bool {
        self.subject.stdout().lines().any(|line| line == "over") || !matches!(self.subject.ended(), Ok(None))
    }

    pub fn move_to(&self, path: &str) -> Result<()> {
        let [h1, h2] = self.scene.lab.hosts();
        let (asked, other) = if path == "host" { (h1, h2) } else { (h2, h1) };
        asked.move_to(self.port, path)?;
        other.wait_for_flow(self.port, path, |flow| flow.path == path).map(drop)
    }

    /// Orders a swap, which the router of the subject refuses with this label.
    pub fn expect_refused(&self, label: &str) -> Result<()> {
        let (host, mut last) = (&self.scene.lab.h1, None);
        let Some(conn) = self.flow()?.conn else { bail!("a connection without a name") };
        std::thread::scope(|scope| {
            // What is refused in passing is tried again for a while.
            let order = scope.spawn(|| host.swap(&conn));
            let found = wait_for(&format!("a refusal with {label}"), DEADLINE, || {
                let flow = self.flow()?;
                ensure!(!flow.on_host(), "it was moved");
                let is_refused = flow.reason.as_deref() == Some(label);
                last = flow.reason;
                if !is_refused && order.is_finished() && last.as_deref() != Some("swapped_back") {
                    bail!("another reason");
                }
                Ok(is_refused.then_some(()))
            });
            found.with_context(|| format!("refused with {last:?}, {label} expected"))
        })
    }

    pub fn flow(&self) -> Result<Flow> {
        self.scene.lab.h1.wait_for_flow(self.port, "known", |_| true)
    }

    /// What the programs say weighs more than what happened to their connection: it may be the cause.
    pub fn leave_after(self, what: Result<()>) -> Result<()> {
        match (self.leave(), what) {
            (Ok(()), what) => what,
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(before)) => Err(error.context(format!("{before:#}"))),
        }
    }

    /// The state ends, and both programs are content.
    pub fn leave(mut self) -> Result<()> {
        for side in [&mut self.partner, &mut self.subject] {
            // One that has left by itself does not listen.
            let _ = side.tell("leave");
        }
        self.end()
    }

    pub fn end(self) -> Result<()> {
        let limit = Duration::from_secs(10);
        let subject = self.subject.wait(limit).context("the subject");
        let partner = self.partner.wait(limit).context("the partner");
        subject.and_then(lab::Finished::expect_success)?;
        partner.and_then(lab::Finished::expect_success)?;
        Ok(())
    }
}
