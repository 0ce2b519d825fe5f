# Who may do what. Pods act by roles of their own (IRSA), never by that of the machine they run on.

locals {
  issuer = replace(aws_eks_cluster.this.identity[0].oidc[0].issuer, "https://", "")
  pods = { # role: which service accounts may take it
    bucket     = ["system:serviceaccount:iir-dist:iir-head", "system:serviceaccount:iir-dist:iir-worker"]
    autoscaler = ["system:serviceaccount:kube-system:cluster-autoscaler"]
  }
}

resource "aws_iam_openid_connect_provider" "this" {
  url            = aws_eks_cluster.this.identity[0].oidc[0].issuer
  client_id_list = ["sts.amazonaws.com"]
}

data "aws_iam_policy_document" "assume_pod" {
  for_each = local.pods
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [aws_iam_openid_connect_provider.this.arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:sub"
      values   = each.value
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "assume_service" {
  for_each = toset(["eks", "ec2"])
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["${each.key}.amazonaws.com"]
    }
  }
}

# The bucket: read, write, delete current versions. Not: old versions, policy, encryption, public access, other buckets.
data "aws_iam_policy_document" "bucket_access" {
  statement {
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.this.arn]
  }
  statement {
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this.arn}/*"]
  }
  statement {
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [aws_kms_key.this.arn]
  }
}

resource "aws_iam_policy" "bucket" {
  name   = "${var.name}-bucket"
  policy = data.aws_iam_policy_document.bucket_access.json
}

resource "aws_iam_role" "bucket" {
  name               = "${var.name}-bucket"
  assume_role_policy = data.aws_iam_policy_document.assume_pod["bucket"].json
}

resource "aws_iam_role_policy_attachment" "bucket" {
  role       = aws_iam_role.bucket.name
  policy_arn = aws_iam_policy.bucket.arn
}

# For cluster/aws.yaml, which has no Kubernetes: the same access for its machines.
resource "aws_iam_role" "node_bucket" {
  name               = "${var.name}-node"
  assume_role_policy = data.aws_iam_policy_document.assume_service["ec2"].json
}

resource "aws_iam_role_policy_attachment" "node_bucket" {
  role       = aws_iam_role.node_bucket.name
  policy_arn = aws_iam_policy.bucket.arn
}

resource "aws_iam_instance_profile" "node_bucket" {
  name = "${var.name}-node"
  role = aws_iam_role.node_bucket.name
}

# Its head besides starts and ends workers: machines that carry the cluster's name (cluster_name there, var.name here).
data "aws_iam_policy_document" "launcher" {
  #checkov:skip=CKV_AWS_356:these Describe actions cannot be limited to resources
  statement {
    actions   = ["ec2:DescribeInstances", "ec2:DescribeImages", "ec2:DescribeInstanceTypes"]
    resources = ["*"]
  }
  statement {
    actions   = ["ec2:RunInstances"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement { # what a machine is made of
    actions = ["ec2:RunInstances"]
    resources = concat(["arn:aws:ec2:${var.region}::image/*"], [
      for part in ["volume", "network-interface", "subnet", "security-group", "key-pair", "spot-instances-request"] :
      "arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:${part}/*"
    ])
  }
  statement {
    actions   = ["ec2:CreateTags"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["arn:aws:ec2:${var.region}:${data.aws_caller_identity.this.account_id}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.node_bucket.arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "launcher" {
  name               = "${var.name}-head"
  assume_role_policy = data.aws_iam_policy_document.assume_service["ec2"].json
}

resource "aws_iam_role_policy" "launcher" {
  name   = "launcher"
  role   = aws_iam_role.launcher.id
  policy = data.aws_iam_policy_document.launcher.json
}

resource "aws_iam_role_policy_attachment" "launcher_bucket" {
  role       = aws_iam_role.launcher.name
  policy_arn = aws_iam_policy.bucket.arn
}

resource "aws_iam_instance_profile" "launcher" {
  name = "${var.name}-head"
  role = aws_iam_role.launcher.name
}

# Kubernetes' own machines may join, have addresses and pull images.
resource "aws_iam_role" "cluster" {
  name               = "${var.name}-cluster"
  assume_role_policy = data.aws_iam_policy_document.assume_service["eks"].json
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_iam_role" "node" {
  name               = "${var.name}-kubernetes-node"
  assume_role_policy = data.aws_iam_policy_document.assume_service["ec2"].json
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each   = toset(["AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly"])
  role       = aws_iam_role.node.name
  policy_arn = "arn:aws:iam::aws:policy/${each.key}"
}

# The cluster autoscaler sees all groups (AWS knows no finer permission) and changes those of this cluster alone.
data "aws_iam_policy_document" "autoscaler" {
  #checkov:skip=CKV_AWS_356:these Describe actions cannot be limited to resources
  statement {
    actions = [
      "autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingInstances",
      "autoscaling:DescribeLaunchConfigurations", "autoscaling:DescribeScalingActivities", "autoscaling:DescribeTags",
      "ec2:DescribeImages", "ec2:DescribeInstanceTypes", "ec2:DescribeLaunchTemplateVersions",
      "ec2:GetInstanceTypesFromInstanceRequirements",
    ]
    resources = ["*"]
  }
  statement {
    actions   = ["eks:DescribeNodegroup"]
    resources = [for group in aws_eks_node_group.this : group.arn]
  }
  statement {
    actions   = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    resources = ["arn:aws:autoscaling:${var.region}:${data.aws_caller_identity.this.account_id}:autoScalingGroup:*"]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}"
      values   = ["owned"]
    }
  }
}

resource "aws_iam_role" "autoscaler" {
  name               = "${var.name}-autoscaler"
  assume_role_policy = data.aws_iam_policy_document.assume_pod["autoscaler"].json
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.autoscaler.id
  policy = data.aws_iam_policy_document.autoscaler.json
}
