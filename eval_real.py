from runtime.eval_real import main

if __name__ == "__main__":
    raise SystemExit(main())
