//! Holds a server for this crate's tests until its standard input ends, or says how to end.

use std::io::BufRead;
use std::process::ExitCode;

use pushpop_server::Server;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("shared") {
        return hold(Server::shared());
    }
    match Server::start() {
        Ok(server) => hold(&server),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn hold(server: &Server) -> ExitCode {
    println!("{}", server.url());
    println!("{}", server.pid().unwrap_or_default());
    println!("{}", server.bin_dir().display());
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.as_str() {
            "exit" => std::process::exit(0),
            "panic" => panic!("as told"),
            "pause" => match server.pause() {
                Ok(()) => println!("paused"),
                Err(error) => println!("{error}"),
            },
            _ => {}
        }
    }
    ExitCode::SUCCESS
}
