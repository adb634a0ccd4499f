//! Run the model on a wgpu device that the application owns, beside whatever else it draws and computes there.
//!
//!     cargo run --release --example embed -- "Once upon a time"

use fourfold::device::gpu;
use fourfold::wgpu;
use fourfold::{DeviceChoice, Engine, Gpu, ReplyOptions, Sampling};
use std::io::Write;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The application's own instance, adapter, device and queue.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let descriptor = wgpu::DeviceDescriptor {
        // Subgroups make the kernels faster, large limits let large weights lie in one piece; neither is needed.
        required_features: adapter.features() & wgpu::Features::SUBGROUP,
        required_limits: adapter.limits(),
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;

    let gpu = Gpu::from_wgpu(device.clone(), queue.clone(), &gpu::Options::default());
    let engine = Engine::builder().device(DeviceChoice::Own(Arc::new(gpu))).build()?;

    // An engine may be shared between threads, and a session sent to one.
    let mut session = engine.session()?;
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "Once upon a time".to_owned());
    let tokens = engine.text_tokens(&prompt)?;
    let worker = std::thread::spawn(move || -> fourfold::Result<()> {
        print!("{prompt}");
        let sampling = Sampling { temperature: 0.7, top_p: 0.9, seed: 7, ..Sampling::default() };
        let options = ReplyOptions { sampling, max_tokens: Some(60), ..ReplyOptions::default() };
        for token in session.reply(&tokens, &options)? {
            print!("{}", token?.text);
            let _ = std::io::stdout().flush();
        }
        println!();
        Ok(())
    });
    worker.join().expect("the worker does not panic")?;

    // The device is still the application's.
    device.poll(wgpu::PollType::wait_indefinitely())?;
    drop(queue);
    Ok(())
}
