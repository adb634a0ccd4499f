//! The program `fourfold`: flags, printing and exit codes around the library. No algorithm lives here or in `cli/`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
