use crate::program::{self, Account};
use crate::{Error, Server, free_port, start_watchdog};

/// What a server is started with, beyond what is usual.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub(crate) settings: Vec<String>,
    pub(crate) variables: Vec<(String, String)>,
    port: Option<u16>,
    primary: Option<String>,
}

impl Setup {
    /// Nothing unusual.
    pub fn new() -> Setup {
        Setup::default()
    }

    /// Gives the server a setting. Those of its address, port and socket directory cannot be changed.
    pub fn setting(mut self, name: &str, value: &str) -> Setup {
        self.settings.push(format!("{name}={value}"));
        self
    }

    /// Gives the server's processes an environment variable.
    pub fn variable(mut self, name: &str, value: &str) -> Setup {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Has the server listen on this port, such as that of one which is gone.
    pub fn port(mut self, port: u16) -> Setup {
        self.port = Some(port);
        self
    }

    /// Makes the server a standby of another, which it reaches by this connection string.
    pub fn standby_of(mut self, primary: &str) -> Setup {
        self.primary = Some(primary.to_owned());
        self.setting("primary_conninfo", primary)
    }

    /// Starts the server, and returns when it takes connections.
    pub fn start(self) -> Result<Server, Error> {
        let bin_dir = program::bin_dir()?;
        let account = Account::find()?;
        let (watchdog, dir) = start_watchdog(account)?;
        let (port, primary) = (self.port, self.primary.clone());
        let mut server = Server { bin_dir, account, setup: self, dir, port: 0, watchdog, postmaster: None };
        match &primary {
            Some(primary) => server.copy_cluster(primary)?,
            None => server.make_cluster()?,
        }
        match port {
            Some(port) => {
                server.port = port;
                server.launch()?;
            }
            None => server.launch_on(free_port)?,
        }
        Ok(server)
    }
}
