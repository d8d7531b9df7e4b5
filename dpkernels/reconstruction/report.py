from dataclasses import dataclass
RiskReport=risk_report=None
