"""The gateway for LeRobot's ``RobotClient``: gRPC and pickles."""
